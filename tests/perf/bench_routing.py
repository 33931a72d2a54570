"""`make bench-routing`: what routing by prefix is worth: hit rate and TTFT beside least-loaded and random routing.

Real servers, `redline serve --dp 2`, one for each way, of a small Llama with random weights. Prompts begin with one of
GROUPS=12 common prefixes of 512 tokens and go on with 32 of their own; outputs have 16. The KV cache of a replica holds
0.6 of the prefixes beside the requests that run: none holds all, both together do.

Each round begins with empty caches and draws new prefixes and requests, the same for all ways, which take turns.
Arrivals are Poisson, at LOAD=0.5,0.8 of what random routing finishes when many are open, measured first. Medians over
ROUNDS=3 of REQUESTS=240. Prints a table and writes results/bench-routing.json.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.loadgen.load import run_closed_loop, run_load
from bench.loadgen.recording import Recording
from bench.results.environment import hardware
from bench.statistics.latencies import latencies
from bench.target.target import Target
from bench.workloads import make_workload
from bench.workloads.arrivals import arrival_times, point_seed
from bench.workloads.base import RequestSpec
from engine.config import ROUTINGS
from tests.perf.cpu_process import RUN_LIMIT_S, Watch
from tests.serving import Served, serve

FILE_WIDTH = 150
RESULTS = Path("results") / "bench-routing.json"
REPLICAS = 2
PREFIX, INPUT, OUTPUT = 512, 32, 16
BLOCK = 32
ROWS = 8
SHARE = 0.6
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "max_position_embeddings": 2048,
    "vocab_size": 8192,
    "eos_token_id": 2,
}


def blocks_of(groups: int) -> int:
    """Blocks of one replica: of its share of the prefixes, and of what running requests add to them."""
    own = ROWS * (-(-(INPUT + OUTPUT) // BLOCK) + 1)
    return 1 + round(SHARE * groups * PREFIX / BLOCK) + own


def flags(blocks: int) -> tuple[str, ...]:
    block_bytes = 2 * LLAMA["num_hidden_layers"] * LLAMA["num_key_value_heads"] * LLAMA["head_dim"] * 2 * BLOCK
    return (
        "--load-format", "dummy", "--dtype", "bfloat16", "--block-size", str(BLOCK), "--max-num-seqs", str(ROWS),
        "--max-model-len", str(PREFIX + INPUT + OUTPUT), "--served-model-name", "model", "--disable-log-requests",
        "--dp", str(REPLICAS), "--kv-cache-memory-bytes", str(REPLICAS * blocks * block_bytes), "--disable-log-stats",
    )  # fmt: skip


def workload(groups: int, count: int, seed: int) -> list[RequestSpec]:
    kind = {"kind": "shared-prefix", "prefix": PREFIX, "input": INPUT, "output": OUTPUT, "prefixes": groups}
    return make_workload(kind, LLAMA["vocab_size"]).requests(count, seed)


def checked(recording: Recording, requests: int) -> Recording:
    bad = [row for row in recording.records((-1.0, float("inf"))) if row.status != "ok"]
    if bad or recording.cut_short:
        sys.exit(f"{len(bad)} of {requests} requests failed: {bad[0].error if bad else 'the run was cut short'}")
    return recording


def capacity(served: Served, specs: list[RequestSpec], concurrency: int) -> float:
    """Requests a second from empty caches, with so many open at any time."""
    served.client.post("/reset_prefix_cache", json={}).raise_for_status()
    began = time.monotonic()
    target = Target(served.url, "model")
    checked(run_closed_loop(target, specs, concurrency, observer=Watch(), time_limit_s=RUN_LIMIT_S), len(specs))
    return len(specs) / (time.monotonic() - began)


def measure(served: Served, specs: list[RequestSpec], rate: float, seed: int) -> dict[str, float]:
    """One run from empty caches: hit rate of all prompt tokens, ms, and how evenly replicas were used."""
    served.client.post("/reset_prefix_cache", json={}).raise_for_status()
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    before = [served.metric(name) for name in names]
    times = arrival_times(rate, len(specs) / rate, point_seed(seed, "arrivals", rate))
    target = Target(served.url, "model")
    recording = run_load(target, specs, times, observer=Watch(), time_limit_s=RUN_LIMIT_S)
    if checked(recording, len(specs)).health.saturated:
        print(f"the load generator did not keep up: {recording.health.reason} (counted as late)", file=sys.stderr)
    queries, hits = (served.metric(name) - was for name, was in zip(names, before, strict=True))
    rows = recording.records((-1.0, float("inf")))
    found = latencies(rows, float(times[-1]))
    return {
        "rate": rate,
        "hit_rate": hits / queries,
        "ttft_p50_ms": float(np.percentile(found.ttft, 50)),
        "ttft_p95_ms": float(np.percentile(found.ttft, 95)),
        "e2e_p50_ms": float(np.percentile(found.e2e, 50)),
        "late": float(recording.health.saturated),  # others had the generator's core
    }


def rows_of(runs: dict[tuple[str, float], list[dict[str, float]]], told: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for (routing, load), some in runs.items():
        middle = {key: round(median(run[key] for run in some), 4) for key in some[0]}
        rates = [run["hit_rate"] for run in some]
        low, high = round(min(rates), 4), round(max(rates), 4)
        late = int(sum(run["late"] for run in some))  # rounds
        row = {"routing": routing, "load": load, **middle, "late": late, "hit_rate_low": low, "hit_rate_high": high}
        rows.append(row | told)
    return rows


def show(console: Console, rows: Sequence[dict[str, Any]]) -> None:
    table = Table("routing", "load", "req/s", "hit rate", "of rounds", "TTFT p50", "TTFT p95", "E2E p50", "late rounds")
    for row in rows:
        table.add_row(
            row["routing"], f"{row['load']:.0%}", f"{row['rate']:.1f}", f"{row['hit_rate']:.1%}",
            f"{row['hit_rate_low']:.1%} - {row['hit_rate_high']:.1%}", f"{row['ttft_p50_ms']:.1f} ms",
            f"{row['ttft_p95_ms']:.1f} ms", f"{row['e2e_p50_ms']:.1f} ms", str(row["late"]),
        )  # fmt: skip
    console.print(table)


def main() -> None:
    groups, requests, rounds = (
        int(os.environ.get(*given)) for given in (("GROUPS", "12"), ("REQUESTS", "240"), ("ROUNDS", "3"))
    )
    loads = [float(load) for load in os.environ.get("LOAD", "0.5,0.8").split(",")]
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)
    runs: dict[tuple[str, float], list[dict[str, float]]] = {(way, load): [] for load in loads for way in ROUTINGS}
    blocks = blocks_of(groups)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(LLAMA))
        servers = {way: stack.enter_context(serve(folder, name, *flags(blocks), "--routing", way)) for way in ROUTINGS}
        most = capacity(servers["random"], workload(groups, requests, 99), 2 * REPLICAS * ROWS)
        console.print(f"random routing finishes {most:.1f} requests/s when many are open; {blocks} blocks a replica")
        for turn in range(rounds):
            for load in loads:
                for way in (*ROUTINGS[turn % 3 :], *ROUTINGS[: turn % 3]):
                    specs = workload(groups, requests, point_seed(turn, "routing", load))
                    run = measure(servers[way], specs, load * most, turn)
                    runs[way, load].append(run)
                    shown = "  ".join(f"{key} {value:.3f}" for key, value in run.items())
                    console.print(f"round {turn + 1}  load {load:.0%}  {way:13} {shown}")
    told = {"replicas": REPLICAS, "groups": groups, "prefix": PREFIX, "input": INPUT, "output": OUTPUT}
    told |= {"requests": requests, "rounds": rounds, "kv_blocks": blocks, "hardware": hardware()}
    rows = rows_of(runs, told)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    show(console, rows)
    console.print(f"rows in {RESULTS}")


if __name__ == "__main__":
    main()
