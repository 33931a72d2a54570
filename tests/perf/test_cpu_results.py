"""What `make bench-cpu` leaves in its file while it runs, and at its end."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.perf.bench_cpu import Run
from tests.perf.cpu_limits import Machine
from tests.perf.cpu_peers import Subject
from tests.perf.cpu_plan import BATCH, WORKLOADS, Plan
from tests.perf.cpu_process import RequestsFailed
from tests.perf.cpu_results import ALONE, Form, Results
from tests.perf.cpu_tables import show

CONFIG = {
    "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
    "num_hidden_layers": 30, "vocab_size": 49152,
}  # fmt: skip


@pytest.fixture
def forms(tmp_path: Path) -> list[Form]:
    subjects = (
        Subject(engine, "bfloat16", {"max_num_seqs": 64}, None, ["serve", "--port", "{port}"])
        for engine in ("redline", "vllm")
    )
    return [Form(subject, subject.make_server(tmp_path)) for subject in subjects]


@pytest.fixture
def results(forms: list[Form], tmp_path: Path) -> Results:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    plan = Plan(tmp_path, CONFIG["vocab_size"], 1, WORKLOADS[:3], None)
    return Results(tmp_path / "rows" / "bench-cpu.json", plan, forms)


def stored(tmp_path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((tmp_path / "rows" / "bench-cpu.json").read_text())
    return found


def of_engines(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["engine"], row["workload"], row["output_tok_s"]) for row in rows if row["engine"] != "limit"]


def test_what_was_measured_is_in_the_file_before_the_end(results: Results, forms: list[Form], tmp_path: Path) -> None:
    results.add_machine(Machine(40.0, 0.8))
    forms[0].first_start_s, forms[0].memory_mb = 5.0, 1200.0
    results.write()
    assert of_engines(stored(tmp_path)) == [("redline", ALONE, None)]
    assert {row["memory_mb"] for row in stored(tmp_path) if row["engine"] == "redline"} == {1200.0}
    forms[0].runs[BATCH.name] = [{"output_tok_s": 1000.0}, {"output_tok_s": 1200.0}]
    results.write()
    assert of_engines(stored(tmp_path)) == [("redline", BATCH.name, 1100.0)]
    assert not any(row["complete"] for row in stored(tmp_path))
    limits = [row for row in stored(tmp_path) if row["engine"] == "limit"]
    assert [row["workload"] for row in limits] == [workload.name for workload in WORKLOADS[:3]]
    assert {(row["read_gb_s_before"], row["read_gb_s_after"]) for row in limits} == {(40.0, None)}


def test_a_failed_turn_is_named_beside_the_others(results: Results, forms: list[Form], tmp_path: Path) -> None:
    forms[0].runs[BATCH.name] = [{"output_tok_s": 1000.0}]
    forms[0].failures[BATCH.name] = ["redline bfloat16: 1 of 64 requests failed"]
    forms[1].first_start_s = 30.0
    forms[1].failures["single"] = ["vllm bfloat16: 1 of 1 requests failed"]
    results.write()
    assert of_engines(stored(tmp_path)) == [("redline", BATCH.name, 1000.0), ("vllm", "single", None)]
    assert [(row["rounds"], len(row["failures"])) for row in stored(tmp_path)] == [(1, 1), (0, 1)]
    show(Console(file=io.StringIO()), results.rows)


def test_requests_that_fail_do_not_end_the_run(forms: list[Form], results: Results, monkeypatch: Any) -> None:
    def failing(self: Any, specs: Any) -> None:
        self.fail("1 of 64 requests failed", RequestsFailed)

    server = forms[0].engine
    server._log.touch()
    for name in ("pause", "resume"):
        monkeypatch.setattr(type(server), name, lambda self: None)
    monkeypatch.setattr(type(server), "all_at_once", failing)
    run = Run(results._plan, forms, (), Console(file=io.StringIO()))
    run.results = results
    run._turn(forms[0], BATCH, 1)
    assert forms[0].failures == {BATCH.name: ["redline bfloat16: 1 of 64 requests failed"]}
    assert forms[0].runs == {}


def test_a_run_that_has_ended_says_so(results: Results, forms: list[Form], tmp_path: Path) -> None:
    for gb_s in (40.0, 44.0, 45.0):
        results.add_machine(Machine(gb_s, 0.8))
    for form, rate in zip(forms, (1200.0, 800.0), strict=True):
        form.runs[BATCH.name] = [{"output_tok_s": rate}]
    results.write(complete=True)
    assert all(row["complete"] for row in stored(tmp_path))
    (limit, *_) = stored(tmp_path)
    assert (limit["read_gb_s_before"], limit["read_gb_s"], limit["read_gb_s_after"]) == (40.0, 44.0, 45.0)
    assert limit["hardware"]["isas"] is not None
    out = Console(file=io.StringIO(), width=200)
    show(out, results.rows)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    for shown in ("before and after: 40.0 and 45.0 GB/s", "1.50×", "vllm"):
        assert shown in text
