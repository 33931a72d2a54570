"""How close the search comes to a capacity that is known: a queue with SLOTS places and a fixed service time.

The real search, plan of windows and criteria run on a simulated queue, 10 seeds for each number of slots; then all of
`redline bench` runs over sockets against a server of that kind, whose service time is short so that 1,600 requests take
seconds. Last, single windows on queues of known capacity, short ones too, with noisy service and bursts of arrivals:
how many of those above the capacity are called sustained. Prints tables and writes results/bench-search.json.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.measurement.progress import ConsoleProgress
from bench.measurement.run import BenchOptions, Subject, measure_configuration
from bench.measurement.server import HttpServer
from bench.results import Answer, RunFiles
from bench.target import Target
from bench.target.server import ServerProcess
from bench.workloads import make_workload
from tests.bench.queue_model import SimulatedBench
from tests.bench.quiet_progress import QuietProgress
from tests.perf.bench_statistics import WRONG_SUSTAINED, most_wrong, verdict_rows, verdict_table
from tests.perf.child_processes import end_with_parent

STUB = Path(__file__).parents[1] / "bench" / "queue_server.py"
SOCKET_SLOTS, SOCKET_SERVICE_S = 64, 0.2  # 320 requests/s: a sixth of what the stub can answer
START_RATE = 0.83  # times the service rate of one slot: no power of two away from a capacity


def simulated(slots: int, seed: int, precision: float) -> dict[str, Any]:
    bench = SimulatedBench(slots, seed, precision)
    answer, rows = bench.search(START_RATE)
    return result("simulated", seed, slots, float(slots), answer) | {"points": len(rows)}


def over_sockets(seed: int, precision: float, console: Console) -> dict[str, Any]:
    """One search as `redline bench` runs it: load generator, real time, result files."""
    command = [sys.executable, str(STUB), "--port", "{port}", "--slots", str(SOCKET_SLOTS)]
    command += ["--service", str(SOCKET_SERVICE_S)]
    options = BenchOptions(seed=seed, precision=precision, max_minutes=8, ladder=False)
    progress = ConsoleProgress(console) if console.is_terminal else QuietProgress()
    with tempfile.TemporaryDirectory() as folder, ServerProcess(command, Path(folder) / "server.log") as server:
        target = Target(server.base_url, "stub")
        workload = make_workload({"kind": "random", "input": 8, "output": 1}, 1000)
        files = RunFiles(folder)
        answer = measure_configuration(Subject(HttpServer(target), workload, "queue", options, files, progress))
        if answer is None:
            raise SystemExit("no load point produced a valid result: " + files.read_points()[-1].reason)
        points = len(files.read_points()) - 1  # the probe is none
    return result("sockets", seed, SOCKET_SLOTS, SOCKET_SLOTS / SOCKET_SERVICE_S, answer) | {"points": points}


def result(queue: str, seed: int, slots: int, capacity: float, answer: Answer) -> dict[str, Any]:
    found = answer.rate or 0.0
    return {
        "seed": seed,
        "slots": slots,
        "capacity": capacity,
        "found": found,
        "error_percent": round(100 * (found / capacity - 1), 2),
        "low": round(answer.low, 4),
        "high": answer.high,
        "confirmed": answer.confirmed,
        "queue": queue,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("queue", "slots", "seed", "capacity", "found", "low–high", "error", "load points"):
        shown.add_column(name, justify="left" if name == "queue" else "right")
    for r in rows:
        shown.add_row(
            r["queue"], str(r["slots"]), str(r["seed"]), f"{r['capacity']:g}", f"{r['found']:.4g}",
            f"{r['low']:.4g}–{r['high'] or 0:.4g}", f"{r['error_percent']:+.1f} %", str(r["points"]),
        )  # fmt: skip
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--slots", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--socket-seeds", type=int, default=1, help="searches over sockets, a minute or two each")
    parser.add_argument("--windows", type=int, default=20, help="single windows of each kind, length and load")
    parser.add_argument("--precision", type=float, default=5.0, help="percent")
    given = parser.parse_args()
    console, precision = Console(), given.precision / 100
    rows = [simulated(slots, seed, precision) for slots in given.slots for seed in range(given.seeds)]
    rows += [over_sockets(seed, precision, console) for seed in range(given.socket_seeds)]
    console.print(table(rows))
    with ProcessPoolExecutor(2, initializer=end_with_parent) as pool:
        windows = verdict_rows(pool, given.windows)
    console.print(verdict_table(windows))
    wrong = most_wrong(windows)
    console.print(f"wrong / undecided windows; at most {wrong:.1%} of a kind are wrongly sustained", highlight=False)
    inside = sum(abs(r["error_percent"]) <= given.precision for r in rows)
    covered = sum(r["low"] <= r["capacity"] <= (r["high"] or r["capacity"]) for r in rows)
    console.print(
        f"{inside} of {len(rows)} answers within {given.precision:g} % of the capacity; {covered} intervals hold it",
        highlight=False,
    )
    path = Path("results") / "bench-search.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows + windows, indent=1) + "\n")
    return 0 if inside == len(rows) and wrong <= WRONG_SUSTAINED else 1


if __name__ == "__main__":
    sys.exit(main())
