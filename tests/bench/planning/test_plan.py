import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.planning.options import Candidate, Wanted
from bench.planning.plan import make_plan
from bench.planning.rows import Row
from bench.results import RunFiles
from cli.simulated import make_engine
from engine.simulation import SimulatedEngine

LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
WANTED = Wanted(
    LLAMA, {"kind": "random", "input": 256, "output": 16}, 300.0, {"ttft_p99_ms": 400.0},
    flags=("--max-model-len", "300"), prices={"h100": 2.5}, precision=0.2,
)  # fmt: skip


def plan(wanted: Wanted, candidates: list[Candidate], folder: Path | None = None, simulate=make_engine) -> list[Row]:
    return list(make_plan(wanted, candidates, simulate, lambda *_: None, folder=folder))


def refuse(_model: str, _flags: list[str]) -> SimulatedEngine:
    raise AssertionError("everything is known already")


def test_replicas_serve_the_load_within_the_limits(tmp_path: Path) -> None:
    shown: list[tuple[str, str]] = []
    found = make_plan(
        WANTED, [Candidate("h100", 1)], make_engine, lambda one, text: shown.append((one.name, text)), folder=tmp_path
    )
    row = next(found)
    assert list(found) == []
    assert row.replicas is not None
    assert row.rate_per_replica is not None
    assert row.gpus == row.replicas
    assert (row.replicas - 1) * row.rate_per_replica < WANTED.rate <= 1.2 * row.replicas * row.rate_per_replica
    assert row.load_per_replica == pytest.approx(WANTED.rate / row.replicas)
    assert row.ttft_p99_ms is not None
    assert row.ttft_p99_ms <= 400
    assert row.output_tok_s == pytest.approx(300 * 16, rel=0.02)
    assert row.dollars_per_hour == pytest.approx(2.5 * row.replicas)
    assert row.binds
    assert shown
    assert shown[0][0] == "h100 TP1"

    summary = RunFiles(tmp_path).read_summary()
    assert summary.simulated
    assert summary.configurations["h100 TP1"]["simulated"]["hardware"] == "h100"
    assert {p.phase for p in RunFiles(tmp_path).read_points()} >= {"search", "fixed"}
    # A second run takes the row from the folder, with the prices that it is given.
    again = plan(replace(WANTED, prices={"h100": 5.0}), [Candidate("h100", 1)], tmp_path, refuse)
    assert again[0].dollars_per_hour == pytest.approx(2 * (row.dollars_per_hour or 0))
    assert replace(again[0], dollars_per_hour=0) == replace(
        row, dollars_per_hour=0, dollars_per_million_output=again[0].dollars_per_million_output,
        dollars_per_million_total=again[0].dollars_per_million_total,
    )  # fmt: skip


def test_a_model_that_does_not_fit_is_a_row(tmp_path: Path) -> None:
    wanted = replace(WANTED, model="meta-llama/Llama-3.3-70B-Instruct")
    (row,) = plan(wanted, [Candidate("h100", 1)], tmp_path)
    assert row.binds == "does not fit"
    assert "--tp" in row.note
    assert row.replicas is None
    assert json.loads((tmp_path / "plan.json").read_text())["rows"][0]["binds"] == "does not fit"


def test_limits_that_no_load_meets_are_named() -> None:
    (row,) = plan(replace(WANTED, limits={"itl_p50_ms": 0.5}), [Candidate("a100", 1)])
    assert row.replicas is None
    assert "itl_p50_ms" in row.note
    assert row.binds == "ITL P50"


def test_other_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(BenchError, match="other results"):
        plan(WANTED, [Candidate("h100", 1)], tmp_path)
