import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.measurement.run import Subject, measure_ladder
from bench.results import PointRecord, RunFiles, Summary
from bench.sweeps.sweep import STATE_FILE, common_ladder, run_sweep
from bench.sweeps.sweepfile import read_sweep
from tests.bench.measurement.test_nvml import StandInGpu, StandInNvml
from tests.bench.quiet_progress import QuietProgress

pytestmark = pytest.mark.usefixtures("patient_generator")

QUEUE = Path(__file__).parents[1] / "queue_server.py"
SHORT = {"kind": "random", "input": 8, "output": 4, "name": "short"}
OPTIONS = {"rates": [30], "window": 0.4, "max_minutes": 0.5, "precision": "20%"}


def stub(*flags: str) -> dict[str, str]:
    return {"command": " ".join([sys.executable, str(QUEUE), "--port", "{port}", "--service", "0.03", *flags])}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep of stub servers; keywords replace its fields."""

    def put(**changed: Any) -> Path:
        data = {
            "title": "Stubs",
            "seed": 3,
            "configurations": {"four": stub("--slots", "4"), "two": stub("--slots", "2")},
            "workloads": [SHORT],
            "options": OPTIONS,
        }
        path = tmp_path / "stubs.yaml"
        path.write_text(yaml.safe_dump(data | changed, sort_keys=False))
        return path

    return put


def sweep(path: Path, **kw: Any) -> Summary:
    return run_sweep(read_sweep(path), path.parent / "out", QuietProgress(), **kw)


def measured(folder: Path) -> set[tuple[str, str, float]]:
    """The set of points; a probe is one request, whose rate is what came out."""
    points = RunFiles(folder).read_points()
    return {(p.configuration, p.phase, 0.0 if p.phase == "probe" else p.rate) for p in points}


def test_given_rates_are_measured_on_every_configuration(write: Callable[..., Path], tmp_path: Path) -> None:
    summary = sweep(write(options=OPTIONS | {"rates": [20, 40]}))
    points = [p for p in RunFiles(tmp_path / "out").read_points() if p.phase == "fixed"]
    assert {(p.configuration, p.rate) for p in points} == {(c, r) for c in ("four", "two") for r in (20.0, 40.0)}
    by_rate = {rate: {p.seed for p in points if p.rate == rate} for rate in (20.0, 40.0)}
    assert all(len(seeds) == 1 for seeds in by_rate.values()), "configurations must see the same requests"
    assert by_rate[20.0] != by_rate[40.0]
    assert {(a.configuration, a.workload) for a in summary.answers} == {("four", "short"), ("two", "short")}
    assert not summary.failures
    assert summary.finished is not None
    assert summary.workloads["short"]["max_model_len"] == 14
    assert summary.configurations["two"]["model"] == "stub"
    assert RunFiles(tmp_path / "out").read_summary() == summary


def test_energy_is_measured_by_configuration(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", StandInNvml(StandInGpu(), StandInGpu()))  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    four, two = stub("--slots", "4") | {"energy_gpus": [1]}, stub("--slots", "4") | {"energy_gpus": "none"}
    summary = sweep(write(configurations={"four": four, "two": two}))
    assert summary.configurations["four"]["energy"] == "GPU 1 NVIDIA H100 80GB HBM3 by NVML (energy counter)"
    assert summary.configurations["two"]["energy"] == "not measured: --energy-gpus none"
    powers = {p.configuration: p.mean_power_w for p in RunFiles(tmp_path / "out").read_points() if p.phase == "fixed"}
    assert powers == {"four": 0.0, "two": None}  # the stand-in's counters stand still


def test_what_is_finished_is_not_measured_again(write: Callable[..., Path], tmp_path: Path) -> None:
    one = {"four": stub("--slots", "4")}
    sweep(write(configurations=one))
    before = {p.point_id: p.started for p in RunFiles(tmp_path / "out").read_points()}
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "logs").iterdir()}
    sweep(write(configurations=one, title="Another title"))
    assert {p.point_id: p.started for p in RunFiles(tmp_path / "out").read_points()} == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "logs").iterdir()} == logs
    assert RunFiles(tmp_path / "out").read_summary().title == "Another title"


def test_a_configuration_that_fails_is_recorded_and_tried_again(write: Callable[..., Path], tmp_path: Path) -> None:
    flag = tmp_path / "works"
    script = f"test -e {flag} || {{ echo 'no memory left'; exit 3; }}; exec {stub('--slots', '2')['command']}"
    path = write(configurations={"shaky": {"command": f'sh -c "{script}"'}, "four": stub("--slots", "4")})
    summary = sweep(path)
    assert list(summary.failures) == ["shaky / short"]
    assert "no memory left" in summary.failures["shaky / short"]
    assert [a.configuration for a in summary.answers] == ["four"]
    before = {p.point_id: p.started for p in RunFiles(tmp_path / "out").read_points()}
    flag.touch()
    summary = sweep(path)
    assert not summary.failures
    assert {a.configuration for a in summary.answers} == {"four", "shaky"}
    after = {p.point_id: p.started for p in RunFiles(tmp_path / "out").read_points()}
    assert before.items() <= after.items()


def test_a_server_that_dies_under_load_is_a_failure_with_its_cause(write: Callable[..., Path]) -> None:
    summary = sweep(write(configurations={"mortal": stub("--exit-from", "8"), "four": stub("--slots", "4")}))
    assert list(summary.failures) == ["mortal / short"]
    assert "exit code 3" in summary.failures["mortal / short"]
    assert [a.configuration for a in summary.answers] == ["four"]


def test_a_vocabulary_that_is_not_told_must_be_given(write: Callable[..., Path]) -> None:
    silent = stub("--no-vocabulary")
    summary = sweep(write(configurations={"silent": silent, "said": silent | {"vocab_size": 500}}))
    assert "configurations.silent.vocab_size" in summary.failures["silent / short"]
    assert [a.configuration for a in summary.answers] == ["said"]


def test_the_ladder_has_the_same_rates_for_all_and_the_time_the_search_left(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = 0.2
    limits: dict[str, float] = {}

    def watched(subject: Subject, finished: list[PointRecord]) -> list[PointRecord]:
        limits[subject.configuration] = subject.options.max_minutes
        return measure_ladder(subject, finished)

    monkeypatch.setattr("bench.sweeps.sweep.measure_ladder", watched)
    summary = sweep(write(options={"precision": "60%", "max_minutes": minutes, "window": 0.25}))
    assert not summary.failures
    found = [a.rate for a in summary.answers if a.rate]
    ladder = summary.workloads["short"]["ladder_rates"]
    assert ladder == common_ladder(found)
    points = [p for p in RunFiles(tmp_path / "out").read_points() if p.phase == "ladder"]
    for name in ("four", "two"):
        rates = sorted(p.rate for p in points if p.configuration == name)
        assert len(rates) >= 2
        assert rates == ladder[: len(rates)], "time may run out, but the rates stay those of all"
    state = json.loads((tmp_path / "out" / STATE_FILE).read_text())
    assert sorted(state["ladders"]) == [["four", "short"], ["two", "short"]]
    for name, limit in limits.items():
        assert limit == pytest.approx(max(minutes - state["searched_s"][f"{name} / short"] / 60, minutes / 2))


def test_a_changed_sweep_is_refused_unless_fresh(write: Callable[..., Path], tmp_path: Path) -> None:
    one = {"four": stub("--slots", "4")}
    sweep(write(configurations={"four": stub("--refuse", "x")}))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "generators.csv").write_text("point_id,generator\n")
    changed = write(configurations=one, options=OPTIONS | {"rates": [25]})
    with pytest.raises(BenchError, match=r"another version of this sweep.*--fresh"):
        sweep(changed)
    sweep(changed, fresh=True)
    assert {rate for _, phase, rate in measured(tmp_path / "out") if phase == "fixed"} == {25.0}
    assert (tmp_path / "out" / "notes.txt").exists()
    assert not (tmp_path / "out" / "generators.csv").exists()


def test_somebody_elses_results_are_not_touched(write: Callable[..., Path], tmp_path: Path) -> None:
    RunFiles(tmp_path / "out").write_summary(Summary("A bench run", 1, {}, {}))
    with pytest.raises(BenchError, match=r"other results.*--out"):
        sweep(write())


def test_fresh_removes_nothing_from_a_folder_that_holds_no_results(write: Callable[..., Path], tmp_path: Path) -> None:
    logs = tmp_path / "out" / "logs"
    logs.mkdir(parents=True)
    (logs / "important").write_text("mine")
    sweep(write(configurations={"four": stub("--refuse", "x")}), fresh=True)
    assert (logs / "important").read_text() == "mine"


def start(path: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cli.main", "sweep", str(path), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[3])


def wait_for_points(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if len(RunFiles(folder).read_points()) >= count:
            return
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.05)
    raise AssertionError("no points within 30 s")


def wait_for_state(folder: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if (folder / STATE_FILE).exists():
            return
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.05)
    raise AssertionError("no sign of life within 30 s")


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in found.stdout.split()]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rsplit(")", 1)[1].split()[0] == "Z"


def assert_all_gone(pids: list[int]) -> None:
    for _ in range(200):
        if all(gone(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"left behind: {pids}")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_sweep_killed_at_any_moment_goes_on(write: Callable[..., Path], tmp_path: Path) -> None:
    """Killed three times, each time at another moment after a first sign of life, then left alone."""
    path = write(options=OPTIONS | {"rates": [20, 30]})
    cut, moments = tmp_path / "cut", random.Random(os.getpid())
    kept: dict[str, str] = {}
    for _ in range(3):
        process = start(path, cut)
        try:
            wait_for_state(cut, process)
            time.sleep(moments.uniform(0.0, 2.5))
            servers = children(process.pid)
        finally:
            process.kill()
            process.communicate(timeout=30)
        assert_all_gone(servers)
        points = {p.point_id: p.started for p in RunFiles(cut).read_points() if p.valid}
        assert kept.items() <= points.items()
        kept = points
    summary = run_sweep(read_sweep(path), cut, QuietProgress())
    points = {p.point_id: p.started for p in RunFiles(cut).read_points()}
    assert kept.items() <= points.items()
    assert all(len(RunFiles(cut).read_requests(name)) for name in points)
    assert len(summary.answers) == 2
    whole = tmp_path / "whole"
    run_sweep(read_sweep(path), whole, QuietProgress())
    assert measured(cut) == measured(whole)
    assert sorted(points) == sorted(p.point_id for p in RunFiles(whole).read_points())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_keeps_everything_and_leaves_no_server(write: Callable[..., Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    process = start(write(options=OPTIONS | {"rates": [20, 30], "window": 2}), cut)
    try:
        wait_for_points(cut, 2, process)
        servers = children(process.pid)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130
    assert "run the same command to continue" in said
    assert "waiting" in said, "the table of runs says what was not reached"
    assert_all_gone(servers)
    assert [p.phase for p in RunFiles(cut).read_points()][:2] == ["probe", "fixed"]
    state = json.loads((cut / STATE_FILE).read_text())
    assert state["searched_s"]["four / short"] > 0


@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=5))
def test_a_ladder_spans_what_was_found(found: list[float]) -> None:
    rates = common_ladder(found)
    assert rates == sorted(set(rates))
    assert 6 <= len(rates) <= 7
    assert rates[0] == pytest.approx(0.25 * min(found), rel=0.01)
    assert rates[-1] == pytest.approx(1.5 * max(found), rel=0.01)


def test_one_answer_gives_the_plain_ladder() -> None:
    assert common_ladder([4.0]) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_shares_of_a_ladder_are_of_the_lowest_rate_found() -> None:
    assert common_ladder([4.0, 9.0], (0.5, 1.0)) == [2.0, 4.0]


def test_too_little_time_for_a_point_is_said(write: Callable[..., Path]) -> None:
    summary = sweep(write(configurations={"four": stub()}, options={"max_minutes": 0.3, "window": 60}))
    assert "one request alone takes 0.0" in summary.failures["four / short"]
    assert "max_minutes is too short" in summary.failures["four / short"]
