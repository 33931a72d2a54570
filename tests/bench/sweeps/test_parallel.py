"""A sweep on simulated hardware in several processes gives what one process gives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bench.results import RunFiles, slug
from bench.sweeps.parallel import PARTS_FOLDER, run_in_processes
from bench.sweeps.sweep import run_sweep
from bench.sweeps.sweepfile import SweepPlan, read_sweep
from cli.simulated import make_engine
from engine.errors import ConfigError
from engine.simulation import SimulatedEngine
from tests.bench.quiet_progress import QuietProgress

LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
SWEEP = {
    "serve": {"device": "sim:h100", "enable-prefix-caching": False},
    "configurations": {"v0": {"serve": {"engine": "v0"}}, "v1": {}, "tp2": {"serve": {"tensor-parallel-size": 2}}},
    "workloads": [
        {"kind": "random", "input": 256, "output": 8, "model": LLAMA, "configurations": ["v0", "v1"]},
        {"kind": "random", "input": 128, "output": 16, "model": LLAMA, "serve": {"max-num-seqs": 64}, "offline": 200},
    ],
    "options": {"precision": "25%", "ladder": [0.5, 1.25], "requests": False},
}


@pytest.fixture
def plan(tmp_path: Path) -> SweepPlan:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    return read_sweep(path)


def refuse(_model: str, _flags: list[str]) -> SimulatedEngine:
    raise ConfigError("refused")


def test_processes_give_what_one_process_gives(plan: SweepPlan, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run_sweep(plan, one, QuietProgress(), make_engine)
    joined = run_in_processes(plan, two, QuietProgress(), make_engine, 2)
    assert joined.failures == {}
    assert (one / "points.csv").read_bytes() == (two / "points.csv").read_bytes()
    assert (one / "sweep.json").read_bytes() == (two / "sweep.json").read_bytes()
    assert joined.answers == alone.answers
    assert joined.configurations == alone.configurations
    assert joined.workloads == alone.workloads
    assert joined.simulated
    assert not (two / PARTS_FOLDER).exists()
    assert not (two / "requests").exists()

    points = RunFiles(two).read_points()
    assert {(p.configuration, p.workload) for p in points} == {
        ("v0", "256/8"), ("v1", "256/8"), ("v0", "128/16"), ("v1", "128/16"), ("tp2", "128/16"),
    }  # fmt: skip
    offline = {p.configuration: p for p in points if p.phase == "offline"}
    assert {p.completed for p in offline.values()} == {200}
    assert offline["tp2"].achieved_rate > offline["v1"].achieved_rate > offline["v0"].achieved_rate
    assert joined.workloads["128/16"]["model"] == LLAMA

    again = run_in_processes(plan, two, QuietProgress(), refuse, 2)  # nothing is left to simulate
    assert again.failures == {}


def test_a_run_that_failed_is_tried_again(plan: SweepPlan, tmp_path: Path) -> None:
    folder = tmp_path / "failed"
    first = run_in_processes(plan, folder, QuietProgress(), refuse, 2)
    assert set(first.failures.values()) == {"refused"}
    assert json.loads((folder / "summary.json").read_text())["failures"] == first.failures


class InterruptedProgress(QuietProgress):
    """Ctrl-C after the first load point of a search."""

    def message(self, text: str) -> None:
        super().message(text)
        if "✓ search" in text:
            raise KeyboardInterrupt


def test_an_interrupted_run_is_continued_by_any_number_of_processes(plan: SweepPlan, tmp_path: Path) -> None:
    folder = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        run_in_processes(plan, folder, InterruptedProgress(), make_engine, 2)
    kept = [point for part in (folder / PARTS_FOLDER).iterdir() for point in RunFiles(part).read_points()]
    assert any(point.phase == "search" for point in kept)
    assert not (folder / "summary.json").exists()
    continued = run_in_processes(plan, folder, QuietProgress(), make_engine, 1)
    assert continued.failures == {}
    assert [bool(answer.rate) for answer in continued.answers] == [True, True]
    points = {repr(point) for point in RunFiles(folder).read_points()}
    assert {repr(point) for point in kept if point.valid} <= points
    assert not (folder / PARTS_FOLDER).exists()


def test_parts_that_were_not_quite_joined_are_joined(plan: SweepPlan, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    for one in plan.workloads:
        run_sweep(replace(plan, workloads=[one]), folder / PARTS_FOLDER / slug(one.name), QuietProgress(), refuse)
    RunFiles(folder).write_points([])  # the first file of the whole sweep
    joined = run_in_processes(plan, folder, QuietProgress(), refuse, 1)
    assert len(joined.failures) == 5
    assert not (folder / PARTS_FOLDER).exists()


def test_folders_of_others_are_kept(plan: SweepPlan, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "list.txt").write_text("screws")
    run_in_processes(plan, tmp_path, QuietProgress(), refuse, 2, fresh=True)
    assert (tmp_path / "parts" / "list.txt").read_text() == "screws"
