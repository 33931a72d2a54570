"""A sweep on simulated hardware in several processes gives what one process gives."""

import json
from pathlib import Path

import pytest
import yaml

from bench.results import RunFiles
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
