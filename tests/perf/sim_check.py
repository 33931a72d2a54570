"""The latency model against published measurements: every load of a file is simulated, with the real core.

    python -m tests.perf.sim_check FILE [--match TEXT] [--out results/sim-check.json]

The file has one figure in a row, with the columns of `tests.perf.sim_rows`. Prints errors by hardware, engine, model
and metric, the rates at which latencies double, and what isn't simulated with the reason; and writes all of it.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from engine.errors import ConfigError
from engine.host import cores
from tests.perf.child_processes import end_with_parent
from tests.perf.sim_loads import simulate
from tests.perf.sim_rows import Case, Skipped, read_cases

DOUBLED = 2.0  # the knee: the rate at which the mean latency is this multiple of that at the lowest rate


@dataclass(frozen=True, slots=True)
class Comparison:
    case: Case
    metric: str
    published: float
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.published - 1


def compare(case: Case) -> list[Comparison] | str:
    """All figures of a case, or why it can't be simulated."""
    try:
        found = simulate(case)
    except ConfigError as error:
        return str(error)
    return [Comparison(case, metric, value, found[metric]) for metric, value in case.published if metric in found]


def summary(comparisons: list[Comparison]) -> dict[str, Any]:
    errors = np.array([one.error for one in comparisons])
    return {
        "n": len(errors),
        "median_error": round(float(np.median(np.abs(errors))), 4),
        "p90_error": round(float(np.quantile(np.abs(errors), 0.9)), 4),
        "bias": round(float(np.median(errors)), 4),
    }


def error_rows(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Errors by everything that tells servers apart, but not by the load."""
    groups: dict[tuple[Any, ...], list[Comparison]] = defaultdict(list)
    for one in comparisons:
        case = one.case
        groups[case.hardware, case.engine, case.version, case.model, case.ranks, case.shape.gemm_dtype, case.load,
               one.metric].append(one)  # fmt: skip
    names = ("hardware", "engine", "version", "model", "tp", "dtype", "load", "metric")
    return [dict(zip(names, key, strict=True)) | summary(group) for key, group in sorted(groups.items())]


def total_rows(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Errors by metric and load: of each engine and each hardware, and of all."""
    groups: dict[tuple[str, str, str, str], list[Comparison]] = defaultdict(list)
    for one in comparisons:
        for engine, hardware in ((one.case.engine, "all"), ("all", one.case.hardware), ("all", "all")):
            groups[one.metric, one.case.load, engine, hardware].append(one)
    names = ("metric", "load", "engine", "hardware")
    return [dict(zip(names, key, strict=True)) | summary(group) for key, group in sorted(groups.items())]


def knees(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """For each server that was measured at several rates: between which ones its latency doubles."""
    groups: dict[tuple[str, str, str, str], list[Comparison]] = defaultdict(list)
    for one in comparisons:
        if one.case.load == "rate" and one.metric == "e2e_latency_mean":
            groups[one.case.hardware, one.case.engine, one.case.version, one.case.model].append(one)
    rows = []
    for key, group in sorted(groups.items()):
        group.sort(key=lambda one: one.case.value)
        rates = [one.case.value for one in group]
        row = dict(zip(("hardware", "engine", "version", "model"), key, strict=True)) | {"rates": rates}
        for name, values in (
            ("published", [one.published for one in group]),
            ("simulated", [one.simulated for one in group]),
        ):
            row[name] = [round(one) for one in values]
            row[f"{name}_knee"] = knee(rates, values)
        rows.append(row)
    return rows


def knee(rates: list[float], latencies: list[float]) -> tuple[float, float | None]:
    """The measured rates between which the latency doubles; the upper one is None if it doesn't."""
    below = rates[0]
    for rate, latency in zip(rates, latencies, strict=True):
        if latency > DOUBLED * latencies[0]:
            return below, rate
        below = rate
    return below, None


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(*rows[0], title=title) if rows else Table(title=f"{title}: none")
    for row in rows:
        table.add_row(*(f"{value:.1%}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


def check(cases: list[Case]) -> tuple[list[Comparison], list[Skipped]]:
    """All figures of the cases, and those that have none."""
    comparisons: list[Comparison] = []
    skipped: list[Skipped] = []
    with ProcessPoolExecutor(cores(), initializer=end_with_parent) as pool:
        for case, found in zip(cases, pool.map(compare, cases), strict=True):
            server = f"{case.model}, {case.hardware}, {case.engine} {case.version}, {case.load}"
            if isinstance(found, str):
                skipped.append(Skipped(server, found, len(case.published)))
                continue
            comparisons += found
            if missing := len(case.published) - len(found):
                skipped.append(Skipped(server, "figures that the client doesn't measure", missing))
    return comparisons, skipped


def skipped_rows(skipped: list[Skipped]) -> list[dict[str, Any]]:
    counts: Counter[tuple[str, str]] = Counter()
    for one in skipped:
        counts[one.what, one.reason] += one.figures
    return [{"what": what, "reason": reason, "figures": count} for (what, reason), count in counts.items()]


def figure_rows(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Every figure with its load."""
    return [
        {"hardware": one.case.hardware, "engine": one.case.engine, "version": one.case.version, "model": one.case.model,
         "tp": one.case.ranks, "dtype": one.case.shape.gemm_dtype, "input": one.case.input, "output": one.case.output,
         "load": one.case.load, "value": one.case.value, "metric": one.metric, "published": one.published,
         "simulated": round(one.simulated, 3)}
        for one in comparisons
    ]  # fmt: skip


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="published measurements")
    parser.add_argument("--match", default="", help="only loads whose model, hardware, engine or version has this text")
    parser.add_argument("--out", type=Path, default=Path("results/sim-check.json"))
    options = parser.parse_args()
    if options.file is None:
        parser.error(
            "give a file of published measurements: make sim-check DATA=FILE; columns: docs/simulation/accuracy.md"
        )
    return options


def main() -> int:
    options = read_options()
    cases, unread = read_cases(options.file)
    wanted = [one for one in cases if options.match in f"{one.model} {one.hardware} {one.engine} {one.version}"]
    comparisons, unserved = check(wanted)
    not_simulated = skipped_rows([one for one in unread if options.match in one.what] + unserved)
    result: dict[str, Any] = {
        "file": options.file.name,
        "rows": error_rows(comparisons),
        "totals": total_rows(comparisons),
        "knees": knees(comparisons),
        "not_simulated": not_simulated,
        "figures": figure_rows(comparisons),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result["rows"], "Errors")
    show(result["knees"], "Rates at which the latency doubles, ms")
    show(not_simulated, "Not simulated")
    show(result["totals"], "All")
    count = sum(one["figures"] for one in not_simulated)
    print(f"{len(comparisons)} figures simulated, {count} not; all in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
