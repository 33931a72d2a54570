"""`make bench-mm-stall`: do text requests wait while pictures are decoded and processed?

Text requests decode on one core, which the EngineCore and its worker have to themselves; API process, pool and clients
share the other one. Meanwhile one of four loads runs:

    none         no pictures
    beside       the same pictures are decoded by a process that does not belong to the server: what the machine alone
                 costs, since cores share caches and memory
    processing   requests with one picture each, which are refused after its processing because their prompt is too
                 long: the pool's load alone
    served       requests with one picture each, answered with one token: also the prefill of the pictures' tokens

A gap is the time between the ends of two steps in which all text requests got a token. If they have not ended after
TIME_LIMIT_S, the time from the last such step on is a gap too: V0 computes waiting prompts first, so that running
requests may get no token at all. The loop's own time is the CPU time of the core's loop thread per gap. Then 300
pictures go through the pool alone, with 1 and 2 processes. Prints tables and writes results/bench-mm-stall.json and the
figure.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.loadgen import run_closed_loop
from bench.results.environment import hardware
from bench.target import Target
from bench.workloads import make_workload
from tests.perf.bar_charts import save_figure
from tests.perf.bench_share import Server, serve
from tests.perf.stall_figure import stall_figure
from tests.perf.stall_load import SIZE, LoadBeside, NoLoad, RequestLoad, pictures
from tests.perf.stall_pool import pool_rows

MODEL, VOCABULARY = "smollm2-135m-vision", 49_152
INPUT = 16
MODEL_LENGTH = 1024
ENGINES = {
    "v1": [],
    "v1, processing inline": ["--ablate", "inline-processing"],
    "v0": ["--engine", "v0"],
}
LOADS = ("none", "beside", "processing", "served")
TIME_LIMIT_S = 120.0
SERVED_SHARE = 4  # the load `served` slows steps down so much that a quarter of the tokens has to do
RESULTS = Path("results") / "bench-mm-stall.json"
FIGURE = Path("docs/figures/bench-mm-stall.png")


@dataclass(frozen=True, slots=True)
class Run:
    """One run: gaps and the loop's own time in each of them, in ms; pictures per second."""

    gaps: np.ndarray
    own: np.ndarray
    pictures_per_s: float


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.perf.bench_mm_stall", description=__doc__)
    parser.add_argument("--streams", type=int, default=8, help="text requests that decode at the same time")
    parser.add_argument("--tokens", type=int, default=300, help="of each text request; a quarter of them with `served`")
    parser.add_argument("--clients", type=int, default=4, help="requests with a picture that are open at any time")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn; gaps of all are taken together")
    parser.add_argument("--pictures", type=int, default=300, help="through the pool; 0 leaves this part out")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--figure", type=Path, default=FIGURE)
    return parser.parse_args()


def main() -> int:
    options = parse()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(usable) < 2 or not Path("/proc/self/schedstat").exists():
        sys.exit("bench-mm-stall needs Linux and two cores: one for core and worker, one for the rest")
    cores = usable[0], usable[1]
    os.sched_setaffinity(0, {cores[1]})
    runs: dict[tuple[str, str], list[Run]] = {}
    print(f"{'':<40} gap, ms: median      P99      max    loop's own P99, ms   pictures/s", flush=True)
    for _ in range(options.rounds):
        for engine in options.engines:
            for load in options.loads:
                run = measure(engine, load, options, cores)
                runs.setdefault((engine, load), []).append(run)
                p99, own = np.percentile(run.gaps, 99), np.percentile(run.own, 99)
                shown = f"{np.median(run.gaps):15.2f}  {p99:7.2f}  {run.gaps.max():7.2f}    {own:18.2f}"
                print(f"{engine:<28}{load:<12}{shown}   {run.pictures_per_s:10.2f}", flush=True)
    rows = [row_of(key, found, runs, options) for key, found in runs.items()]
    os.sched_setaffinity(0, set(usable))
    if options.pictures:
        rows += pool_rows(MODEL, options.pictures)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    save_figure(stall_figure, RESULTS, options.figure)
    print(f"rows in {RESULTS}, figure in {options.figure}")
    return 0


def measure(engine: str, load: str, options: argparse.Namespace, cores: tuple[int, int]) -> Run:
    """Serve, decode the text requests under a load, and read the logs of core and device."""
    flags = ["--max-model-len", str(MODEL_LENGTH), "--max-num-seqs", str(options.streams + options.clients)]
    flags += ["--mm-processors", "1", *ENGINES[engine]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        device, rest = cores
        environment = {"CORE_MODULE": "tests.perf.stall_core"}
        with serve(folder, flags, device, {rest}, model=MODEL, environment=environment) as server:
            pictures_per_s, limits = decode(server, load, options, rest)
        steps = np.fromfile(folder / "device.bin", dtype=np.int64).reshape(-1, 3)
        turns = np.fromfile(folder / "loop.bin", dtype=np.int64).reshape(-1, 3)
    return Run(*per_gap(steps, turns, options.streams, limits), pictures_per_s)


def decode(server: Server, load: str, options: argparse.Namespace, rest: int) -> tuple[float, tuple[int, int] | None]:
    """Run the text requests to their end, or for TIME_LIMIT_S.

    Returns pictures per second, and if the time was over, when the text requests began and when it was, in ns.
    """
    working = make_load(load, server.url, options.clients, rest)
    target = Target(server.url, MODEL)
    tokens = options.tokens // (SERVED_SHARE if load == "served" else 1)
    specs = make_workload({"kind": "random", "input": INPUT, "output": tokens}, VOCABULARY)
    watcher = Watcher()
    with working:
        working.wait_until_busy()
        server.move_host({rest})  # the pool's process, too
        before, began = working.progress(), time.monotonic_ns()
        recording = run_closed_loop(
            target, specs.requests(options.streams, 1), options.streams, observer=watcher, time_limit_s=TIME_LIMIT_S
        )
        after, ended = working.progress(), time.monotonic_ns()
    bad = [row.status for row in recording.records((-1.0, float("inf"))) if row.status != "ok"]
    if watcher.failed:
        sys.exit(f"{watcher.failed} of {options.streams} text requests failed: {bad[0]}")
    return (after[0] - before[0]) / (after[1] - before[1]), (began, ended) if bad else None


def make_load(load: str, url: str, clients: int, rest: int) -> NoLoad:
    if load == "none":
        return NoLoad()
    if load == "beside":
        return LoadBeside(pictures(SIZE), rest)
    refused = load == "processing"
    return RequestLoad(url, MODEL, pictures(SIZE), clients, MODEL_LENGTH - 54 if refused else 4, refused=refused)


class Watcher:
    """The load generator's observer: goes on until a request fails."""

    failed = 0

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        self.failed = failed
        return not failed


def per_gap(
    steps: np.ndarray, turns: np.ndarray, streams: int, limits: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Gaps between decode steps and the loop's own time in each, ms.

    Args:
        steps, turns: as share_core.py and stall_core.py log them.
        limits: begin and end, in ns, of text requests that did not end in time; None: they ended.
    """
    ends = np.unique(steps[steps[:, 2] >= streams, 1])
    if limits is not None:
        ends = np.concatenate([[limits[0]], ends[(ends > limits[0]) & (ends < limits[1])], [limits[1]]])
    elif len(ends) < 10:
        sys.exit("the text requests hardly ever decoded together: raise --tokens")
    place = np.searchsorted(ends, turns[:, 1], side="left")  # of the gap that ends at ends[place]
    own = np.bincount(place, weights=turns[:, 2], minlength=len(ends) + 1)[1 : len(ends)]
    return np.diff(ends) / 1e6, own / 1e6


def row_of(
    key: tuple[str, str], found: Sequence[Run], runs: dict[tuple[str, str], list[Run]], options: argparse.Namespace
) -> dict[str, Any]:
    """The record of an engine under a load; ratios are to the same engine without pictures."""
    engine, load = key
    gaps = np.concatenate([run.gaps for run in found])
    own = np.concatenate([run.own for run in found])
    free = runs.get((engine, "none"), found)
    base = np.concatenate([run.gaps for run in free])
    p50, p99 = float(np.median(gaps)), float(np.percentile(gaps, 99))
    return {
        "part": "stall",
        "model": MODEL,
        "engine": engine,
        "load": load,
        "streams": options.streams,
        "picture": f"PNG, {SIZE[0]}x{SIZE[1]}",
        "gap_p50_ms": round(p50, 3),
        "gap_p99_ms": round(p99, 3),
        "gap_max_ms": round(float(gaps.max()), 3),
        "gap_p50_ratio": round(p50 / float(np.median(base)), 3),
        "gap_p99_ratio": round(p99 / float(np.percentile(base, 99)), 3),
        "loop_p50_ms": round(float(np.median(own)), 4),
        "loop_p99_ms": round(float(np.percentile(own, 99)), 4),
        "loop_p99_of_step": round(float(np.percentile(own, 99)) / float(np.median(base)), 4),
        "pictures_per_s": round(median(run.pictures_per_s for run in found), 2),
        "gaps": len(gaps),
        "rounds": len(found),
        "hardware": f"{hardware()['cpu']}, 1 core for core and worker, 1 for API process, pool and clients",
    }


if __name__ == "__main__":
    sys.exit(main())
