"""Writes what is known about the errors of simulated latencies, from a run of `make sim-check`.

    python -m tests.perf.sim_accuracy [results/sim-check.json]

Reads the figures that were simulated, and writes datasets/hardware/accuracy.json, from which the errors in figures,
reports and summary.json come: for each hardware and engine, the median and the 90th percentile of the relative errors
of mean TPOT and mean TTFT. Only closed loops count: beyond the knee of a rate, and in bursts, errors are those of a
queue. Only V1 and V0 count: other engines have host costs and kernels of their own, with which no user simulates.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from engine.data import datasets_folder

METRICS = {"tpot_mean": "tpot", "ttft_mean": "ttft"}
ENGINES = ("v1", "v0")
LEAST_ROWS = 5  # fewer say nothing about a 90th percentile
File = dict[str, dict[str, dict[str, dict[str, float | int]]]]


def known_errors(figures: list[dict[str, Any]]) -> File:
    """Errors by hardware, engine and metric.

    Args:
        figures: those of `results/sim-check.json`.
    """
    groups: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for one in figures:
        metric = METRICS.get(one["metric"])
        if metric is not None and one["engine"] in ENGINES and one["load"] == "closed":
            error = abs(one["simulated"] / one["published"] - 1)
            groups[one["hardware"], one["engine"], metric].append(error)
    found: File = {}
    for (hardware, engine, metric), errors in sorted(groups.items()):
        if len(errors) >= LEAST_ROWS:
            median, p90 = (round(float(np.quantile(errors, share)), 4) for share in (0.5, 0.9))
            row: dict[str, float | int] = {"median": median, "p90": p90, "rows": len(errors)}
            found.setdefault(hardware, {}).setdefault(engine, {})[metric] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path("results/sim-check.json"))
    figures = json.loads(parser.parse_args().file.read_text())["figures"]
    path = datasets_folder() / "hardware" / "accuracy.json"
    path.write_text(json.dumps(known_errors(figures), indent=1) + "\n")
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
