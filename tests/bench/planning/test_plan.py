import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.planning.options import Candidate, PlanRequest
from bench.planning.plan import make_plan
from bench.planning.rows import Row
from bench.results import RunFiles
from cli.simulated import make_engine
from engine.hardware.description import description_path
from engine.simulation import SimulatedEngine

LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"
REQUEST = PlanRequest(
    LLAMA, {"kind": "random", "input": 256, "output": 16}, 300.0, {"ttft_p99_ms": 400.0},
    flags=("--max-model-len", "300"), prices={"h100": 2.5}, precision=0.2,
)  # fmt: skip
TOO_LARGE = replace(REQUEST, model=LLAMA_70B)  # for one GPU: a plan that needs no simulation


def plan(
    request: PlanRequest, candidates: list[Candidate], folder: Path | None = None, simulate=make_engine
) -> list[Row]:
    return list(make_plan(request, candidates, simulate, lambda *_: None, folder=folder))


def refuse(_model: str, _flags: list[str]) -> SimulatedEngine:
    raise AssertionError("everything is known already")


def rows_in(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())["rows"]
    return found


def costs_in(folder: Path) -> list[float]:
    """Dollars an hour in both files."""
    with (folder / "plan.csv").open(newline="") as file:
        (table_row,) = csv.DictReader(file)
    (row,) = rows_in(folder)
    return [row["dollars_per_hour"], float(table_row["dollars_per_hour"])]


def test_replicas_serve_the_load_within_the_limits(tmp_path: Path) -> None:
    shown: list[tuple[str, str]] = []
    found = make_plan(
        REQUEST, [Candidate("h100", 1)], make_engine, lambda one, text: shown.append((one.name, text)), folder=tmp_path
    )
    row = next(found)
    assert list(found) == []
    assert row.replicas is not None
    assert row.rate_per_replica is not None
    assert row.gpus == row.replicas
    assert (row.replicas - 1) * row.rate_per_replica < REQUEST.rate <= 1.2 * row.replicas * row.rate_per_replica
    assert row.load_per_replica == pytest.approx(REQUEST.rate / row.replicas)
    assert row.ttft_p99_ms is not None
    assert row.ttft_p99_ms <= 400
    assert row.output_tok_s == pytest.approx(300 * 16, rel=0.02)
    assert row.dollars_per_hour == pytest.approx(2.5 * row.replicas)
    assert row.limited_by in ("TTFT P99", "KV capacity", "batch slots", "queue")
    assert shown
    assert shown[0][0] == "h100 TP1"

    summary = RunFiles(tmp_path).read_summary()
    assert summary.simulated
    mark = summary.configurations["h100 TP1"]["simulated"]
    assert mark["hardware"] == "h100"
    assert json.loads((tmp_path / "plan.json").read_text())["hardware"] == {"h100": mark}
    assert mark["errors"]["tpot"]["median"] > 0
    assert {p.phase for p in RunFiles(tmp_path).read_points()} >= {"search", "fixed"}
    # A second run takes the row from the folder, with the prices that it is given.
    again = plan(replace(REQUEST, prices={"h100": 5.0}), [Candidate("h100", 1)], tmp_path, refuse)
    assert again[0].dollars_per_hour == pytest.approx(2 * (row.dollars_per_hour or 0))
    assert costs_in(tmp_path) == pytest.approx([5.0 * row.replicas] * 2, rel=1e-5)
    assert replace(again[0], dollars_per_hour=0) == replace(
        row, dollars_per_hour=0, dollars_per_million_output=again[0].dollars_per_million_output,
        dollars_per_million_total=again[0].dollars_per_million_total,
    )  # fmt: skip


def test_a_model_that_does_not_fit_is_a_row(tmp_path: Path) -> None:
    (row,) = plan(TOO_LARGE, [Candidate("h100", 1)], tmp_path)
    assert row.limited_by == "does not fit"
    assert "--tp" in row.note
    assert row.replicas is None
    assert rows_in(tmp_path)[0]["limited_by"] == "does not fit"


def test_what_the_hardware_does_not_have_is_not_a_lack_of_memory() -> None:
    fp8 = replace(REQUEST, flags=(*REQUEST.flags, "--quantization", "fp8"))
    (row,) = plan(fp8, [Candidate("a100", 1)])
    assert (row.limited_by, row.replicas) == ("not supported", None)
    assert "fp8" in row.note


def test_rows_outlive_the_description_of_their_hardware(tmp_path: Path) -> None:
    ours = tmp_path / "ours.yaml"
    shutil.copy(description_path("h100"), ours)
    folder = tmp_path / "plan"
    plan(TOO_LARGE, [Candidate(str(ours), 1)], folder)
    ours.rename(tmp_path / "moved.yaml")
    plan(TOO_LARGE, [Candidate("a100", 1)], folder)
    rows = rows_in(folder)
    assert {row["hardware"] for row in rows} == {str(ours), "a100"}
    ours.write_text((tmp_path / "moved.yaml").read_text() + "\n# changed\n")
    with pytest.raises(AssertionError, match="known already"):
        plan(TOO_LARGE, [Candidate(str(ours), 1)], folder, refuse)


def test_limits_that_no_load_meets_are_named() -> None:
    (row,) = plan(replace(REQUEST, limits={"itl_p50_ms": 0.5}), [Candidate("a100", 1)])
    assert row.replicas is None
    assert "itl_p50_ms" in row.note
    assert row.limited_by == "ITL P50"


def test_an_interrupted_plan_keeps_its_rows_and_is_continued(tmp_path: Path) -> None:
    small, large = [Candidate("a100", 1), Candidate("h100", 1)], [Candidate("h100", 8), Candidate("h100", 4)]

    def interrupt(candidate: Candidate, _: str) -> None:
        done = rows_in(tmp_path) if (tmp_path / "plan.json").exists() else []
        if candidate in large and len(done) == 2:
            raise KeyboardInterrupt

    rows = make_plan(TOO_LARGE, [*small, *large], make_engine, interrupt, folder=tmp_path, processes=2)
    with pytest.raises(KeyboardInterrupt):
        list(rows)
    assert [row["limited_by"] for row in rows_in(tmp_path)] == ["does not fit"] * 2
    continued = plan(TOO_LARGE, small, tmp_path, refuse)
    assert [row.hardware for row in continued] == ["a100", "h100"]


def test_other_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(BenchError, match="other results"):
        plan(REQUEST, [Candidate("h100", 1)], tmp_path)
