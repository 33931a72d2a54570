"""What a simulation costs: CPU time of 1,000 simulated seconds at 64 rows, and memory of 100,000 requests.

Both are closed loops on a simulated H100 with Llama-3.1-8B, as `redline bench --device sim:h100 --concurrency N` runs
them, from the workload to the result files. Each case has a process of its own, whose peak memory is that of the case.
Prints a table and writes results/bench-simulation.json. With --profile, the functions that the first case spends its
time in.
"""

import argparse
import cProfile
import json
import pstats
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measurement.closed_loop import ClosedPoint, measure_closed_loop
from bench.results import RunFiles
from bench.search.windows import TimeBudget
from bench.simulation import SimulatedServer
from bench.workloads import make_workload
from engine.config import EngineConfig
from engine.simulation import simulate
from tests.bench.quiet_progress import QuietProgress
from tests.perf.child_processes import run_child

MODEL = "meta-llama/Meta-Llama-3.1-8B-Instruct"
# Name, concurrency, requests, input, output, simulated seconds at most, and the limits: CPU seconds, GB.
CASES: dict[str, tuple[int, int, int, int, float, float | None, float | None]] = {
    "1,000 s at 64 rows": (64, 4000, 500, 2000, 1000.0, 20.0, None),
    "100,000 requests": (256, 100_000, 500, 200, 1e6, None, 2.0),
}


def run(name: str) -> dict[str, Any]:
    """One case in this process."""
    concurrency, requests, inputs, outputs, seconds, most_cpu_s, most_gb = CASES[name]
    engine = simulate(EngineConfig(model=MODEL, device="sim:h100", max_num_seqs=concurrency, max_model_len=4096))
    server = SimulatedServer(engine.simulation, engine.title)
    workload = make_workload({"kind": "random", "input": inputs, "output": outputs}, engine.vocab_size)
    budget = TimeBudget(seconds, server.now)
    point = ClosedPoint(server, workload, "v1", server.open_reader(), 0, 0.1, budget.left_s)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        record, _ = measure_closed_loop(point, RunFiles(folder), QuietProgress(), concurrency, requests, budget)
    cpu_s = time.process_time() - began
    steps = sum(one.steps for one in engine.simulation.stats())
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        "case": name,
        "concurrency": concurrency,
        "requests": record.completed,
        "simulated_s": round(server.now(), 1),
        "cpu_s": round(cpu_s, 2),
        "steps": steps,
        "us_per_step": round(cpu_s / steps * 1e6, 1),
        "peak_gb": round(peak_gb, 3),
        "most_cpu_s": most_cpu_s,
        "most_gb": most_gb,
        "passed": (most_cpu_s is None or cpu_s <= most_cpu_s) and (most_gb is None or peak_gb <= most_gb),
    }


def in_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.perf.bench_simulation", "--case", name]
    found: dict[str, Any] = json.loads(run_child(command, check=True, capture_output=True, text=True).stdout)
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("case", "simulated", "CPU", "a step", "peak memory", "limit"):
        shown.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        limit = f"{row['most_cpu_s']:g} s" if row["most_cpu_s"] else f"{row['most_gb']:g} GB"
        shown.add_row(
            row["case"], f"{row['simulated_s']:.0f} s", f"{row['cpu_s']:.1f} s", f"{row['us_per_step']:.0f} µs",
            f"{row['peak_gb']:.2f} GB", limit, style="" if row["passed"] else "red",
        )  # fmt: skip
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="run one case in this process and print its row")
    parser.add_argument("--profile", action="store_true", help="print where the first case spends its time")
    given = parser.parse_args()
    if given.profile:
        profile = cProfile.Profile()
        profile.runcall(run, next(iter(CASES)))
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        return 0
    if given.case:
        print(json.dumps(run(given.case)))
        return 0
    rows = [in_process(name) for name in CASES]
    Console().print(table(rows))
    path = Path("results") / "bench-simulation.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
