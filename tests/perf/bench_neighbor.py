"""`make bench-neighbor`: what an engine on the CPU keeps while another program computes on its cores.

    half   a process on each core that computes for 5 ms and sleeps for 5 ms (tests/perf/neighbor.py)
    busy   a process on each core that always computes

Engines are served over HTTP and get the same requests without a neighbor and with either, in turns; an engine without
a turn is stopped (SIGSTOP):

    single   one request of 128/128 tokens
    x16      16 requests of 128/128 tokens, all at once

`kept` is the throughput beside the neighbor over the one without; `left` is the share of the cores' time that the
neighbor left over in these runs, which an engine that loses nothing else would keep. Medians over ROUNDS=3.
VLLM_PYTHON=… adds vLLM (see cpu_peers.py), ONLY=redline,vllm picks engines, MODEL=… another model, WORKLOADS=single one
workload. Prints a table, and writes results/bench-neighbor.json after each turn, and docs/figures/bench-neighbor.png.
"""

import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.results.environment import hardware
from bench.results.writing import replace_file
from bench.workloads import make_workload
from bench.workloads.arrivals import point_seed
from tests.perf.bar_charts import save_figure
from tests.perf.bench_cpu import all_started, token_figures
from tests.perf.cpu_peers import asked_engines, cores, subjects
from tests.perf.cpu_plan import asked_model, asked_rounds, asked_workloads
from tests.perf.cpu_process import Server
from tests.perf.cpu_results import Form
from tests.perf.neighbor import neighbor
from tests.perf.neighbor_figure import neighbor_figure

RESULTS = Path("results") / "bench-neighbor.json"
FIGURE = Path("docs/figures/bench-neighbor.png")
INPUT, OUTPUT = 128, 128
REQUESTS = {"single": 1, "x16": 16}
ENGINES = ["redline", "vllm"]
NEIGHBORS = ("none", "half", "busy")
Key = tuple[str, str, str]  # engine, workload, neighbor
Runs = dict[Key, list[dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    vocabulary: int
    rounds: int
    workloads: tuple[str, ...]


def make_plan() -> Plan:
    workloads = asked_workloads(REQUESTS)
    return Plan(*asked_model(), asked_rounds(), workloads)


def make_forms(plan: Plan, folder: Path) -> list[Form]:
    found = [
        one for one in subjects(plan.model, asked_engines() or ENGINES) if one.precision == "bfloat16" and not one.mode
    ]
    return [Form(one, one.make_server(folder)) for one in found]


def measure(server: Server, workload: str, plan: Plan, seed: int, beside: str) -> dict[str, float]:
    """One run, beside a neighbor of this kind."""
    kind = {"kind": "random", "input": INPUT, "output": OUTPUT}
    specs = make_workload(kind, plan.vocabulary).requests(REQUESTS[workload], point_seed(seed, workload, 0))
    with neighbor(beside, () if beside == "none" else cores()) as other:
        rows = server.all_at_once(specs).records((-1.0, float("inf")))
        share = other.share()
    return {**token_figures(rows), "neighbor_share": share}


def take_turns(forms: Sequence[Form], plan: Plan) -> Runs:
    """Each round begins with another neighbor. The first one, to warm up, has none and does not count."""
    runs: Runs = {}
    for number in range(-1, plan.rounds):
        kinds = [*NEIGHBORS[number % 3 :], *NEIGHBORS[: number % 3]] if number >= 0 else ["none"]
        for form in forms:
            engine = form.engine
            assert isinstance(engine, Server)
            engine.resume()
            try:
                for workload in plan.workloads:
                    for kind in kinds:
                        run = measure(engine, workload, plan, number, kind)
                        if number >= 0:
                            runs.setdefault((form.subject.engine, workload, kind), []).append(run)
                            show(f"round {number + 1}", form.subject.engine, workload, kind, run)
            finally:
                engine.pause()
            if runs:
                write_rows(runs, plan)
    return runs


def show(when: str, engine: str, workload: str, kind: str, run: dict[str, float]) -> None:
    beside = "alone" if kind == "none" else f"beside {kind} {run['neighbor_share']:4.0%}"
    print(
        f"{when:<8} {engine:<8} {workload:<7} {beside:<17} {run['output_tok_s']:8,.1f} tok/s   "
        f"ITL P50 {run['itl_p50_ms']:7.2f}  P99 {run['itl_p99_ms']:7.2f} ms",
        flush=True,
    )


def write_rows(runs: Runs, plan: Plan) -> list[dict[str, Any]]:
    def place(key: Key) -> tuple[int, ...]:
        return ENGINES.index(key[0]), list(REQUESTS).index(key[1]), NEIGHBORS.index(key[2])

    rows = [row_of(key, runs, plan) for key in sorted(runs, key=place)]
    replace_file(RESULTS, lambda path: path.write_text(json.dumps(rows, indent=1) + "\n"))
    return rows


def row_of(key: Key, runs: Runs, plan: Plan) -> dict[str, Any]:
    engine, workload, kind = key
    own, alone = runs[key], runs.get((engine, workload, "none"))
    middle = {name: round(median(run[name] for run in own), 4) for name in own[0]}
    rates = [run["output_tok_s"] for run in own]
    return {
        "engine": engine,
        "workload": workload,
        "neighbor": kind,
        "model": plan.model.name,
        **middle,
        "output_tok_s_low": round(min(rates), 3),
        "output_tok_s_high": round(max(rates), 3),
        "kept": round(middle["output_tok_s"] / median(run["output_tok_s"] for run in alone), 4) if alone else None,
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
    rows = write_rows(runs, plan)
    for row in rows:
        show("median", row["engine"], row["workload"], row["neighbor"], row)
        if row["neighbor"] != "none":
            print(f"         kept {row['kept']:.0%} of the throughput; left to it {row['left']:.0%} of the cores' time")
    save_figure(neighbor_figure, RESULTS, FIGURE)
    print(f"rows in {RESULTS}, figure in {FIGURE}")


if __name__ == "__main__":
    main()
