"""Rounds of a ladder: configurations take turns, each round has requests of its own, an interrupted one goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.results import PointRow, RunFiles
from bench.run import Subject, measure_ladder
from bench.sweepfile import read_sweep
from tests.bench.test_sweep import sweep, write  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("patient_generator")

OPTIONS = {"precision": "60%", "max_minutes": 0.3, "window": 0.25, "ladder": [0.5, 1], "rounds": 2}


def test_configurations_take_turns_and_an_interrupted_round_goes_on(
    write: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns: list[tuple[str, int]] = []

    def watched(subject: Subject, finished: list[PointRow]) -> list[PointRow]:
        turns.append((subject.configuration, subject.options.ladder_round))
        if len(turns) == 4:
            raise KeyboardInterrupt
        return measure_ladder(subject, finished)

    monkeypatch.setattr("bench.sweep.measure_ladder", watched)
    path = write(options=OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        sweep(path)
    assert turns == [("four", 0), ("two", 0), ("four", 1), ("two", 1)]
    summary = sweep(path)
    assert turns[4:] == [("two", 1)], "only what was missing"
    assert not summary.failures
    points = [p for p in RunFiles(tmp_path / "out").read_points() if p.phase == "ladder"]
    rates = summary.workloads["short"]["ladder_rates"]
    wanted = {(name, rate, turn) for name in ("four", "two") for rate in rates for turn in (0, 1)}
    assert {(p.configuration, p.rate, p.repeat) for p in points} == wanted
    seeds = {(p.rate, p.repeat): {q.seed for q in points if (q.rate, q.repeat) == (p.rate, p.repeat)} for p in points}
    assert all(len(same) == 1 for same in seeds.values()), "all configurations see the same requests"
    assert len({seed for same in seeds.values() for seed in same}) == len(seeds), "and each round others"


def test_the_time_a_sweep_may_take_counts_the_servers_of_every_round(write: Callable[..., Path]) -> None:  # noqa: F811
    once, twice = (read_sweep(write(options=OPTIONS | {"rounds": n})).most_minutes() for n in (1, 2))
    assert twice > once


@pytest.mark.parametrize("rounds", [0, 1.5, True, "two"])
def test_rounds_must_be_a_number_of_them(write: Callable[..., Path], rounds: object) -> None:  # noqa: F811
    with pytest.raises(BenchError, match="rounds must be a whole number of at least 1"):
        read_sweep(write(options=OPTIONS | {"rounds": rounds}))
