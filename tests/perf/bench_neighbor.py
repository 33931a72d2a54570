"""`make bench-neighbor`: what an engine on the CPU keeps beside a neighbor that takes half of each core.

The neighbor computes for 5 ms and sleeps for 5 ms on each core (tests/perf/neighbor.py). Engines are served over HTTP
and get the same requests with and without it, in turns; an engine without a turn is stopped (SIGSTOP):

    single   one request of 128/128 tokens
    x16      16 requests of 128/128 tokens, all at once

`kept` is the throughput with the neighbor over the one without; `left` is the share of the cores' time that the
neighbor left over in these runs, which an engine that loses nothing else would keep. Medians over ROUNDS=3.
VLLM_PYTHON=… adds vLLM (see cpu_peers.py), ONLY=redline,vllm picks engines, MODEL=… another model, WORKLOADS=single one
workload. Prints a table, writes results/bench-neighbor.json and docs/figures/bench-neighbor.png.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.results.environment import hardware
from bench.statistics.latencies import latencies
from bench.workloads import make_workload
from bench.workloads.arrivals import point_seed
from engine.model.resolve import resolve_model
from tests.perf.bar_charts import save_figure
from tests.perf.bench_cpu import Form, all_started, wall_s
from tests.perf.cpu_peers import cores, subjects
from tests.perf.cpu_process import Server
from tests.perf.neighbor import neighbor
from tests.perf.neighbor_figure import neighbor_figure

RESULTS = Path("results") / "bench-neighbor.json"
FIGURE = Path("docs/figures/bench-neighbor.png")
INPUT, OUTPUT = 128, 128
REQUESTS = {"single": 1, "x16": 16}
ENGINES = ["redline", "vllm"]
Key = tuple[str, str, bool]  # engine, workload, with the neighbor


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    vocabulary: int
    rounds: int
    workloads: tuple[str, ...]


def make_plan() -> Plan:
    workloads = tuple(filter(None, os.environ.get("WORKLOADS", "").split(","))) or tuple(REQUESTS)
    for name in workloads:
        if name not in REQUESTS:
            sys.exit(f"WORKLOADS={name}: choose from {', '.join(REQUESTS)}")
    model = resolve_model(os.environ.get("MODEL", "smollm2-135m"))
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    return Plan(model, vocabulary, int(os.environ.get("ROUNDS", "3")), workloads)


def make_forms(plan: Plan, folder: Path) -> list[Form]:
    only = [name for name in os.environ.get("ONLY", "").split(",") if name] or ENGINES
    found = [one for one in subjects(plan.model, only) if one.precision == "bfloat16" and not one.mode]
    return [Form(one, one.make_server(folder)) for one in found]


def measure(server: Server, workload: str, plan: Plan, seed: int, busy: Sequence[int]) -> dict[str, float]:
    """One run, with the neighbor on the cores `busy`."""
    kind = {"kind": "random", "input": INPUT, "output": OUTPUT}
    specs = make_workload(kind, plan.vocabulary).requests(REQUESTS[workload], point_seed(seed, workload, 0))
    with neighbor(busy) as beside:
        rows = server.all_at_once(specs).records((-1.0, float("inf")))
        share = beside.share()
    found = latencies(rows, wall_s(rows))
    return {
        "output_tok_s": sum(row.output_tokens for row in rows) / wall_s(rows),
        "itl_p50_ms": float(np.percentile(found.itl, 50)),
        "itl_p99_ms": float(np.percentile(found.itl, 99)),
        "neighbor_share": share,
    }


def take_turns(forms: Sequence[Form], plan: Plan) -> dict[Key, list[dict[str, float]]]:
    """Every other round begins with the neighbor."""
    runs: dict[Key, list[dict[str, float]]] = {}
    for number in range(-1, plan.rounds):
        for form in forms:
            engine = form.engine
            assert isinstance(engine, Server)
            engine.resume()
            try:
                for workload in plan.workloads:
                    for busy in (False, True) if number % 2 else (True, False):
                        run = measure(engine, workload, plan, number, cores() if busy else ())
                        if number < 0:  # to warm up
                            continue
                        runs.setdefault((form.subject.engine, workload, busy), []).append(run)
                        show(f"round {number + 1}", form.subject.engine, workload, busy, run)
            finally:
                engine.pause()
    return runs


def show(when: str, engine: str, workload: str, busy: bool, run: dict[str, float]) -> None:
    beside = f"neighbor {run['neighbor_share']:4.0%}" if busy else "alone"
    print(
        f"{when:<8} {engine:<8} {workload:<7} {beside:<13} {run['output_tok_s']:8,.1f} tok/s   "
        f"ITL P50 {run['itl_p50_ms']:7.2f}  P99 {run['itl_p99_ms']:7.2f} ms",
        flush=True,
    )


def row_of(key: Key, runs: dict[Key, list[dict[str, float]]], plan: Plan) -> dict[str, Any]:
    engine, workload, busy = key
    own, alone = runs[key], runs[engine, workload, False]
    middle = {name: round(median(run[name] for run in own), 4) for name in own[0]}
    rates = [run["output_tok_s"] for run in own]
    return {
        "engine": engine,
        "workload": workload,
        "neighbor": busy,
        "model": plan.model.name,
        **middle,
        "output_tok_s_low": round(min(rates), 3),
        "output_tok_s_high": round(max(rates), 3),
        "kept": round(middle["output_tok_s"] / median(run["output_tok_s"] for run in alone), 4),
        "left": round(1 - middle["neighbor_share"], 4),
        "rounds": len(own),
        "hardware": f"{hardware()['cpu']}, {len(cores())} cores",
    }


def main() -> None:
    if not Path("/proc/self/schedstat").exists():
        sys.exit("bench-neighbor needs Linux")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of what ends the engines
    plan = make_plan()
    with tempfile.TemporaryDirectory() as name:
        forms = make_forms(plan, Path(name))
        with all_started(forms):
            runs = take_turns(forms, plan)
    rows = [row_of(key, runs, plan) for key in runs]
    rows.sort(key=lambda row: (ENGINES.index(row["engine"]), list(REQUESTS).index(row["workload"]), row["neighbor"]))
    for row in rows:
        show("median", row["engine"], row["workload"], row["neighbor"], row)
        if row["neighbor"]:
            print(f"         kept {row['kept']:.0%} of the throughput; left to it {row['left']:.0%} of the cores' time")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    save_figure(neighbor_figure, RESULTS, FIGURE)
    print(f"rows in {RESULTS}, figure in {FIGURE}")


if __name__ == "__main__":
    main()
