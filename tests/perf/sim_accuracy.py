"""Writes what is known about the errors of simulated latencies, from a run of `make sim-check`.

    python -m tests.perf.sim_accuracy [results/sim-check.json]

Reads the figures that were simulated, and writes datasets/hardware/accuracy.json, from which the errors in figures,
reports and summary.json come: for each hardware, the median and the 90th percentile of the relative errors of mean TPOT
and mean TTFT over all loads.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from engine.data import datasets_folder

METRICS = {"tpot_mean": "tpot", "ttft_mean": "ttft"}
LEAST_ROWS = 5  # fewer say nothing about a 90th percentile


def known_errors(figures: list[dict[str, object]]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Errors by hardware and metric."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one in figures:
        if (metric := METRICS.get(str(one["metric"]))) is not None:
            error = abs(float(str(one["simulated"])) / float(str(one["published"])) - 1)
            groups[str(one["hardware"]), metric].append(error)
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for (hardware, metric), errors in sorted(groups.items()):
        if len(errors) >= LEAST_ROWS:
            median, p90 = (round(float(np.quantile(errors, share)), 4) for share in (0.5, 0.9))
            found.setdefault(hardware, {})[metric] = {"median": median, "p90": p90, "rows": len(errors)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=Path("results/sim-check.json"))
    figures = json.loads(parser.parse_args().file.read_text())["figures"]
    path = datasets_folder() / "hardware" / "accuracy.json"
    path.write_text(json.dumps(known_errors(figures), indent=1) + "\n")
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
