"""The rows of `make bench-cpu`: written whenever something was measured, so that a run that is killed leaves them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.results.environment import hardware
from bench.results.writing import replace_file
from engine.kernels.cpu.build import supported_isas
from tests.perf.cpu_limits import Machine, Shape
from tests.perf.cpu_peers import Subject
from tests.perf.cpu_plan import Plan
from tests.perf.cpu_process import Engine, Server

ALONE = "alone"  # the workload of a row whose engine has had no turn yet


@dataclass(slots=True)
class Form:
    """A subject's Python API or its server: what was measured of it."""

    subject: Subject
    engine: Engine
    memory_mb: float = 0.0
    idle_cpu_percent: float = 0.0
    first_start_s: float = 0.0
    runs: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # by workload
    failures: dict[str, list[str]] = field(default_factory=dict)  # turns that failed, by workload


class Results:
    """All that was measured so far, in a file.

    `complete` is false in all rows until the run has come to its end.
    """

    def __init__(self, path: Path, plan: Plan, forms: Sequence[Form]):
        self.rows: list[dict[str, Any]] = []
        self._path = path
        self._plan = plan
        self._forms = forms
        self._machines: list[Machine] = []
        self._hardware = hardware() | {"isas": supported_isas()}

    def add_machine(self, machine: Machine) -> None:
        """The first one is measured before all engines, the last one after them."""
        self._machines.append(machine)

    def write(self, complete: bool = False) -> None:
        rows = limit_rows(self._plan, self._machines, self._hardware, complete)
        for form in self._forms:
            rows += rows_of(form, self._hardware)
        self.rows = [row | {"complete": complete} for row in rows]
        replace_file(self._path, lambda path: path.write_text(json.dumps(self.rows, indent=1) + "\n"))


def rows_of(form: Form, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    subject = form.subject
    if not form.runs and not form.first_start_s:
        return
    told = form.engine.versions | ({"build": subject.version} if subject.version else {})
    workloads = dict.fromkeys((*form.runs, *form.failures)) or (ALONE,)
    for workload in workloads:
        runs = form.runs.get(workload, [])
        middle = {key: round(median(run[key] for run in runs), 3) for key in (runs[0] if runs else ())}
        rates = [run["output_tok_s"] for run in runs]
        yield {
            "engine": subject.engine,
            "precision": subject.precision,
            "mode": subject.mode,
            "workload": workload,
            "output_tok_s": middle.get("output_tok_s"),
            "output_tok_s_low": round(min(rates), 3) if rates else None,
            "output_tok_s_high": round(max(rates), 3) if rates else None,
            "ready_s": round(form.engine.ready_s, 2),
            "first_start_s": round(form.first_start_s, 2),
            "memory_mb": round(form.memory_mb, 1),
            "idle_cpu_percent": round(form.idle_cpu_percent, 2),
            "ttft_p50_ms": middle.get("ttft_p50_ms"),
            "itl_p50_ms": middle.get("itl_p50_ms"),
            "itl_p99_ms": middle.get("itl_p99_ms"),
            "tokens_per_chunk": middle.get("tokens_per_chunk"),
            "rounds": len(runs),
            "failures": form.failures.get(workload, []),
            "form": "server" if isinstance(form.engine, Server) else "python",
            "versions": told,
            "settings": subject.settings,
            "hardware": machine,
        }


def limit_rows(plan: Plan, machines: Sequence[Machine], told: dict[str, Any], complete: bool) -> list[dict[str, Any]]:
    """The limits of the offline workloads, from the medians of what the machine has shown so far."""
    if not machines:
        return []
    shape, first, last = Shape.read(plan.model), machines[0], machines[-1]
    middle = Machine(median(m.read_gb_s for m in machines), median(m.gemm_tflop_s for m in machines))
    figures = {
        "read_gb_s": round(middle.read_gb_s, 2),
        "gemm_tflop_s": round(middle.gemm_tflop_s, 3),
        "read_gb_s_before": round(first.read_gb_s, 2),
        "read_gb_s_after": round(last.read_gb_s, 2) if complete else None,
        "gemm_tflop_s_before": round(first.gemm_tflop_s, 3),
        "gemm_tflop_s_after": round(last.gemm_tflop_s, 3) if complete else None,
    }
    found = []
    for workload in plan.workloads:
        if workload.rate is None:
            count = len(plan.specs(workload, 0))
            rate = shape.output_tok_s(middle, count, workload.input, workload.output, decode_only=workload.single)
            row: dict[str, Any] = {"engine": "limit", "precision": "bfloat16", "mode": "", "workload": workload.name}
            row |= {"output_tok_s": round(rate, 2), "ready_s": None, "memory_mb": None, "ttft_p50_ms": None}
            found.append(row | {"itl_p99_ms": None} | figures | {"hardware": told})
    return found
