"""`make bench-validity`: what a profile of this machine predicts, beside what `redline bench` measures on this machine.

For each of three workloads: `redline profile`, since a machine's speed changes within minutes; then the sustained rate,
and latencies at five rates up to it, measured and simulated with the same requests. MODEL=… takes another model,
MINUTES=5 is the time of a search, WORKLOADS=32/64,128/16 picks some. What was measured isn't measured again, so that an
interrupted run goes on; delete results/bench-validity to start anew.
STAGE=measure or STAGE=simulate does one half only. Prints a table, writes results/bench-validity.json, with the keys
workload, metric, rate, measured, simulated and error, and docs/figures/bench-validity.png.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import PointRecord, RunFiles
from bench.results.environment import hardware
from bench.search.bracket import round_rate
from cli.exit_codes import FAILED_REQUESTS, UNDECIDED
from engine.hardware.description import read_hardware
from plots.style import save
from tests.perf.child_processes import run_child
from tests.perf.validity_figure import validity_figure

RESULTS = Path("results") / "bench-validity"
PICTURE = Path("docs") / "figures" / "bench-validity.png"
WORKLOADS = ("32/64", "128/16", "256/32")
SHARES = (0.3, 0.5, 0.7, 0.85, 1.0)  # of the sustained rate
PRECISION = "15%"  # of the searches
EQUAL_LOADS = ("--warmup", "5", "--window", "30")  # the same requests at the same times, measured and simulated
METRICS = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
LIMITS = {"sustained": 0.10, "ttft_p50_ms": 0.15, "itl_p50_ms": 0.15}  # of the errors


@dataclass(frozen=True, slots=True)
class Sustained:
    """A search's answer: the highest rate that was sustained, and the lowest above it that was not, if any."""

    rate: float
    failed: float | None
    confirmed: bool


@dataclass(frozen=True, slots=True)
class Side:
    """One half: what is measured, or what is simulated."""

    name: str
    flags: tuple[str, ...]

    def bench(self, workload: str, part: str, options: list[str]) -> RunFiles:
        """One run of `redline bench`, unless an earlier one was completed."""
        folder = RESULTS / f"{self.name}-{workload.replace('/', '-')}-{part}"
        ended = folder / "exit_code"
        if not ended.exists():
            shutil.rmtree(folder, ignore_errors=True)
            given, made = workload.split("/")
            command = [sys.executable, "-m", "cli.main", "bench", "--input", given, "--output", made, *self.flags]
            code = run_child([*command, *options, "--out", str(folder)], check=False).returncode
            if code not in (0, FAILED_REQUESTS, UNDECIDED):  # no answer is one too
                sys.exit(f"{self.name} {workload}: redline bench ended with exit code {code}")
            ended.write_text(f"{code}\n")
        return RunFiles(folder)

    def sustained(self, workload: str, limits: list[str]) -> Sustained:
        """What the search of `redline bench` answers."""
        (answer,) = self.bench(workload, "search", ["--no-ladder", *limits]).read_summary().answers
        if answer.rate is None:
            sys.exit(f"{self.name} {workload}: no rate is sustained; raise MINUTES")
        return Sustained(answer.rate, answer.high, answer.confirmed)

    def points(self, workload: str, rates: list[float]) -> dict[float, PointRecord]:
        given = ",".join(f"{rate:g}" for rate in rates)
        files = self.bench(workload, "rates", ["--rates", given, *EQUAL_LOADS])
        return {point.rate: point for point in files.read_points() if point.phase == "fixed"}


def profile_of(workload: str) -> Path:
    """The description of this machine just before a workload was measured."""
    return RESULTS / f"profile-{workload.replace('/', '-')}.yaml"


def rows_of(
    workload: str, rates: tuple[Sustained, Sustained], points: list[tuple[PointRecord, PointRecord]]
) -> list[dict[str, Any]]:
    """Rows of the result file: sustained rates, then latencies; measured and simulated."""
    measured_rate, simulated_rate = rates
    first = _row(workload, "sustained", None, measured_rate.rate, simulated_rate.rate)
    rows = [
        first
        | {"measured_failed": measured_rate.failed, "simulated_failed": simulated_rate.failed}
        | {"measured_confirmed": measured_rate.confirmed}
    ]
    for measured, simulated in points:
        if not measured.valid:
            rows.append({"workload": workload, "rate": measured.rate, "metric": "none", "reason": measured.reason})
            continue
        for metric in METRICS:
            row = _row(workload, metric, measured.rate, getattr(measured, metric), getattr(simulated, metric))
            rows.append(row | {"disturbed": measured.disturbed})
    return rows


def _row(workload: str, metric: str, rate: float | None, measured: float, simulated: float) -> dict[str, Any]:
    return {
        "workload": workload,
        "metric": metric,
        "rate": rate,
        "measured": round(measured, 3),
        "simulated": round(simulated, 3),
        "error": round(simulated / measured - 1, 4),
    }


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    for workload in dict.fromkeys(row["workload"] for row in rows):
        table = Table(title=f"{workload}: measured, simulated, error", box=None, title_justify="left", pad_edge=False)
        table.add_column("req/s", justify="right")
        for metric in METRICS:
            table.add_column(metric.removesuffix("_ms").replace("_", " "), justify="right")
        mine = [row for row in rows if row["workload"] == workload]
        for rate in dict.fromkeys(row["rate"] for row in mine if row["rate"]):
            cells = [row for row in mine if row["rate"] == rate]
            table.add_row(f"{rate:g}", *(row.get("reason") or _cell(row) for row in cells))
        console.print(table)
        failed = f"not {mine[0]['measured_failed'] or '?'}; simulated not {mine[0]['simulated_failed'] or '?'}"
        doubt = "" if mine[0]["measured_confirmed"] else ", not confirmed"
        console.print(f"sustained: {_cell(mine[0])} req/s; measured {failed}{doubt}\n")
    for metric, limit in LIMITS.items():
        errors = [abs(row["error"]) for row in rows if row["metric"] == metric]
        within = sum(error <= limit for error in errors)
        text = f"{metric}: median error {median(errors):.1%}, {within} of {len(errors)} within {limit:.0%}"
        console.print(text, style="bold", highlight=False)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['measured']:.4g} {row['simulated']:.4g} {row['error']:+.0%}"


def main() -> None:
    model, minutes = os.environ.get("MODEL", "smollm2-135m"), float(os.environ.get("MINUTES", "5"))
    stage = os.environ.get("STAGE", "measure,simulate")
    workloads = [name for name in os.environ.get("WORKLOADS", "").split(",") if name] or list(WORKLOADS)
    measured = Side("measured", ("--model", model))
    RESULTS.mkdir(parents=True, exist_ok=True)
    limits = ["--precision", PRECISION, "--max-minutes", f"{minutes:g}"]
    found: dict[str, tuple[Sustained, dict[float, PointRecord]]] = {}
    for name in workloads:
        if not profile_of(name).exists():
            run_child([sys.executable, "-m", "cli.main", "profile", "--out", str(profile_of(name))], check=True)
        rate = measured.sustained(name, limits)
        found[name] = rate, measured.points(name, [round_rate(share * rate.rate) for share in SHARES])
    if "simulate" not in stage:
        return
    for folder in RESULTS.glob("simulated-*"):  # of an earlier version
        shutil.rmtree(folder)
    rows: list[dict[str, Any]] = []
    for name, (rate, points) in found.items():
        simulated = Side("simulated", ("--model", model, "--device", f"sim:{profile_of(name)}"))
        predicted = simulated.points(name, list(points))
        pairs = [(point, predicted[at]) for at, point in points.items()]
        rows += rows_of(name, (rate, simulated.sustained(name, [])), pairs)
    told = {"model": model, "hardware": hardware(), "profiled": read_hardware(str(profile_of(workloads[0]))).title}
    RESULTS.with_suffix(".json").write_text(json.dumps([row | told for row in rows], indent=1) + "\n")
    show(Console(highlight=False), rows)
    for path in save(validity_figure(rows, model, hardware()["cpu"]), PICTURE):
        print(path)


if __name__ == "__main__":
    main()
