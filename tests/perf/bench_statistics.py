"""How often the instrument's statements hold: simulations of its intervals and of its verdicts, with a known truth.

Intervals: the P99 of the gaps of an engine whose requests share its steps, 1 to 256 at a time. How many of the 95 %
intervals hold the P99 of a run of a million steps, and how many pairs of equal runs lie apart ("more than chance").

Verdicts: queues of known capacity at 1.1, 1.25 and 1.5 times it, in windows of 14 to 400 requests, with services all
alike, noisy or exponential and with arrivals in bursts. How many windows say "sustained".

Prints two tables and writes results/bench-statistics.json.
"""

import argparse
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.statistics.intervals import joined_gaps, percentile_interval
from tests.bench.queue_model import KINDS, verdict_of
from tests.bench.step_model import streams, true_percentile
from tests.perf.child_processes import end_with_parent

STEPS = {1: 4000, 8: 2000, 32: 2000, 128: 1000, 256: 1000}  # of a window, by requests at a time
WRONG_SUSTAINED = 0.05  # of windows above the capacity, at most
OVERLOADS, WINDOWS, SLOTS = (1.1, 1.25, 1.5), (14, 24, 100, 400), (2, 8, 32)


def interval(case: tuple[int, int, bool]) -> tuple[float, float]:
    """The interval of one window, in seconds: (slots, seed, lengths of steps that depend on nothing)."""
    slots, seed, independent = case
    if not independent:
        return percentile_interval(*_swapped(streams(slots, STEPS[slots], seed)))
    rng = np.random.default_rng(seed)
    ends = np.cumsum(np.exp(0.3 * rng.standard_normal(STEPS[slots])))
    stamps = ends + 0.01 * rng.random((slots, 1))
    return percentile_interval(*_swapped((stamps[:, 0].tolist(), list(np.diff(stamps, axis=1)))))


def _swapped(given: tuple[list[float], list[np.ndarray]]) -> tuple[np.ndarray, float, np.ndarray]:
    gaps, steps = joined_gaps(*given)
    return gaps, 99.0, steps


def interval_rows(pool: ProcessPoolExecutor, runs: int) -> list[dict[str, Any]]:
    """Coverage, and equal runs that lie apart, for steps that depend on nothing and for the model of an engine."""
    rows: list[dict[str, Any]] = []
    for independent, slots in itertools.product((True, False), STEPS):
        truth = float(np.exp(0.3 * 2.3263479)) if independent else true_percentile(slots, 99)
        found = list(pool.map(interval, [(slots, 2 * seed, independent) for seed in range(runs)], chunksize=5))
        covered = sum(low <= truth <= high for low, high in found) / runs
        apart = sum(a[0] > b[1] or b[0] > a[1] for a, b in zip(found[::2], found[1::2], strict=True)) / (runs // 2)
        model = "independent steps" if independent else "engine"
        rows.append({"kind": f"interval, {model}", "slots": slots, "coverage": round(covered, 4), "runs": runs})
        rows.append({"kind": f"equal configurations, {model}", "slots": slots, "wrong": round(apart, 4)})
    return rows


def verdicts(case: tuple[str, int, int, float, int]) -> list[bool | None]:
    """Of some windows at a load: whether each is sustained; None: undecided."""
    kind, slots, requests, load, runs = case
    return [verdict_of(kind, slots, load, requests, seed).sustained for seed in range(runs)]


def verdict_rows(pool: ProcessPoolExecutor, runs: int) -> list[dict[str, Any]]:
    """Wrong verdicts of each kind of queue and window, over all overloads; and what half of the capacity is called."""
    rows = []
    cases = list(itertools.product(KINDS, SLOTS, WINDOWS))
    for load in (*OVERLOADS, 0.5):
        found = pool.map(verdicts, [(*case, load, runs) for case in cases])
        for (kind, slots, requests), said in zip(cases, found, strict=True):
            row = {"kind": f"verdict, {kind}", "slots": slots, "requests": requests, "load": load}
            share = said.count(True) / runs
            wrong = share if load > 1 else said.count(False) / runs
            rows.append(row | {"wrong": round(wrong, 4), "undecided": round(said.count(None) / runs, 4)})
    return rows


def interval_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("steps", "requests at a time", "intervals that hold the P99", "equal runs that lie apart"):
        table.add_column(name, justify="left" if name == "steps" else "right")
    shown = [r for r in rows if "coverage" in r]
    for row in shown:
        model = row["kind"].removeprefix("interval, ")
        (apart,) = (
            r["wrong"]
            for r in rows
            if r["kind"] == f"equal configurations, {model}" and r["slots"] == row["slots"]
        )  # fmt: skip
        table.add_row(model, str(row["slots"]), f"{row['coverage']:.1%}", f"{apart:.1%}")
    return table


def verdict_table(rows: list[dict[str, Any]]) -> Table:
    """Over all numbers of slots: wrong / undecided, in percent."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("queue, requests in the window")
    for load in (0.5, *OVERLOADS):
        table.add_column(f"{load:g} x capacity", justify="right")
    mine = [r for r in rows if r["kind"].startswith("verdict")]
    for kind, requests in itertools.product(KINDS, WINDOWS):
        cells = []
        for load in (0.5, *OVERLOADS):
            some = [r for r in mine if (r["kind"], r["requests"], r["load"]) == (f"verdict, {kind}", requests, load)]
            wrong, open_ones = (float(np.mean([r[key] for r in some])) for key in ("wrong", "undecided"))
            cells.append(f"{wrong:.1%} / {open_ones:.0%}")
        table.add_row(f"{kind}, {requests}", *cells)
    return table


def most_wrong(rows: list[dict[str, Any]]) -> float:
    """The largest share of windows above the capacity that were called sustained, over all numbers of slots."""
    shares: dict[tuple[str, int, float], list[float]] = {}
    for row in rows:
        if row["kind"].startswith("verdict") and row["load"] > 1:
            shares.setdefault((row["kind"], row["requests"], row["load"]), []).append(row["wrong"])
    return max(float(np.mean(of_slots)) for of_slots in shares.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=300, help="windows a row of the intervals")
    parser.add_argument("--verdicts", type=int, default=60, help="windows a row of the verdicts")
    given = parser.parse_args()
    console = Console(width=120)
    with ProcessPoolExecutor(2, initializer=end_with_parent) as pool:
        rows = interval_rows(pool, given.runs)
        console.print(interval_table(rows))
        console.print()
        rows += verdict_rows(pool, given.verdicts)
    console.print(verdict_table(rows))
    console.print("wrong / undecided; wrong: sustained above the capacity, not sustained at half of it")
    path = Path("results") / "bench-statistics.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(f"results: {path}", highlight=False)
    held = all(0.93 <= r["coverage"] <= 0.97 for r in rows if "coverage" in r)
    equal = all(r["wrong"] <= 0.06 for r in rows if r["kind"].startswith("equal"))
    return 0 if held and equal and most_wrong(rows) <= WRONG_SUSTAINED else 1


if __name__ == "__main__":
    sys.exit(main())
