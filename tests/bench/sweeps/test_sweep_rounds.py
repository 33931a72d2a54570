"""Rounds of a ladder: configurations take turns, each round has requests of its own, an interrupted one goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.measurement.run import Subject, measure_configuration, measure_ladder
from bench.results import Answer, PointRecord, RunFiles
from bench.sweeps.sweepfile import read_sweep
from tests.bench.sweeps.test_sweep import sweep, write  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("patient_generator")

OPTIONS = {"precision": "60%", "max_minutes": 0.3, "window": 0.25, "ladder": [0.5, 1], "rounds": 2}


def test_one_is_searched_configurations_take_turns_and_an_interrupted_round_goes_on(
    write: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[tuple[str, int]] = []

    def watched(subject: Subject, finished: list[PointRecord]) -> list[PointRecord]:
        turns.append((subject.configuration, subject.options.round))
        if len(turns) == 4:
            raise KeyboardInterrupt
        return measure_ladder(subject, finished)

    monkeypatch.setattr("bench.sweeps.sweep.measure_ladder", watched)
    # Only the first is searched; a slow machine gets to the last rate too.
    path = write(options=OPTIONS | {"max_minutes": 0.45, "search": "first"})
    with pytest.raises(KeyboardInterrupt):
        sweep(path)
    assert turns == [("four", 0), ("two", 0), ("four", 1), ("two", 1)]
    summary = sweep(path)
    assert turns[4:] == [("two", 1)], "only what was missing"
    assert not summary.failures
    (answer,) = summary.answers
    assert answer.configuration == "four"
    assert answer.rate is not None
    rates = summary.workloads["short"]["ladder_rates"]
    assert rates == [pytest.approx(share * answer.rate, rel=1e-2) for share in (0.5, 1)]
    points = RunFiles(tmp_path / "out").read_points()
    assert {p.configuration for p in points if p.phase == "search"} == {"four"}
    points = [p for p in points if p.phase == "ladder"]
    wanted = {(name, rate, turn) for name in ("four", "two") for rate in rates for turn in (0, 1)}
    assert {(p.configuration, p.rate, p.repeat) for p in points} == wanted
    seeds = {(p.rate, p.repeat): {q.seed for q in points if (q.rate, q.repeat) == (p.rate, p.repeat)} for p in points}
    assert all(len(same) == 1 for same in seeds.values()), "all configurations see the same requests"
    assert len({seed for same in seeds.values() for seed in same}) == len(seeds), "and each round others"


def test_given_rates_have_rounds_too(
    write: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[tuple[str, int]] = []

    def watched(subject: Subject, finished: list[PointRecord]) -> Answer | None:
        turns.append((subject.configuration, subject.options.round))
        if len(turns) == 3:
            raise KeyboardInterrupt
        return measure_configuration(subject, finished)

    monkeypatch.setattr("bench.sweeps.sweep.measure_configuration", watched)
    path = write(options={"rates": [20, 40], "window": 0.2, "max_minutes": 0.6, "rounds": 2})
    with pytest.raises(KeyboardInterrupt):
        sweep(path)
    summary = sweep(path)
    assert turns == [("four", 0), ("two", 0), ("four", 1), ("four", 1), ("two", 1)]
    assert not summary.failures
    assert [a.configuration for a in summary.answers] == ["four", "two"], "one answer each, of all rounds"
    points = [p for p in RunFiles(tmp_path / "out").read_points() if p.phase == "fixed"]
    wanted = {(name, rate, turn) for name in ("four", "two") for rate in (20.0, 40.0) for turn in (0, 1)}
    assert {(p.configuration, p.rate, p.repeat) for p in points} == wanted


def test_the_time_a_sweep_may_take_counts_the_servers_of_every_round(write: Callable[..., Path]) -> None:  # noqa: F811
    once, twice = (read_sweep(write(options=OPTIONS | {"rounds": n})).max_minutes() for n in (1, 2))
    first = read_sweep(write(options=OPTIONS | {"search": "first"})).max_minutes()
    fixed = read_sweep(write(options=OPTIONS | {"rates": [1]})).max_minutes()
    assert fixed < first < twice
    assert once < twice


@pytest.mark.parametrize("rounds", [0, 1.5, True, "two"])
def test_rounds_must_be_a_number_of_them(write: Callable[..., Path], rounds: object) -> None:  # noqa: F811
    with pytest.raises(BenchError, match="rounds must be an integer of at least 1"):
        read_sweep(write(options=OPTIONS | {"rounds": rounds}))
