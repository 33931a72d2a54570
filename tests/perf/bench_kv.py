"""`make bench-kv`: what --kv-spill is worth in conversations whose working set is four times the KV cache.

Real servers of a small Llama with random weights: without the flag, with host memory for the whole working set, and
with host memory for a quarter of it and files for the rest. CONVERSATIONS=32 conversations have six turns of 128 tokens
in and 32 out, and each request has the history of its conversation as its prefix. The working set is the mean history
of all conversations. Files are read through the page cache of the machine.

Each round begins with empty caches and draws new conversations, the same for all servers, which take turns. One turn of
each conversation fills the caches; the next REQUESTS=120 turns are measured. Arrivals are Poisson, at LOAD=0.6 of what
the server without the flag finishes when many are open, measured first. Medians over ROUNDS=3. Prints a table, writes
results/bench-kv.json and draws docs/figures/bench-kv.png.
"""

import json
import os
import re
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.loadgen.load import run_load
from bench.results.environment import hardware
from bench.statistics.latencies import latencies
from bench.target.target import Target
from bench.workloads import make_workload
from bench.workloads.arrivals import arrival_times, point_seed
from bench.workloads.base import RequestSpec
from tests.perf.bar_charts import save_figure
from tests.perf.bench_routing import LLAMA, capacity, checked
from tests.perf.cpu_process import RUN_LIMIT_S, Watch
from tests.perf.kv_figure import OFF, kv_figure
from tests.serving import Served, serve

FILE_WIDTH = 150
RESULTS, FIGURE = Path("results") / "bench-kv.json", Path("docs") / "figures" / "bench-kv.png"
TURNS, INPUT, OUTPUT = 6, 128, 32
LONGEST = TURNS * (INPUT + OUTPUT)
BLOCK = 32
ROWS = 4
FACTOR = 4  # working set in KV caches
BLOCK_BYTES = 2 * LLAMA["num_hidden_layers"] * LLAMA["num_key_value_heads"] * LLAMA["head_dim"] * 2 * BLOCK
COUNTERS = {
    "queries": "vllm:prefix_cache_queries_total",
    "hits": "vllm:prefix_cache_hits_total",
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of KV blocks."""

    working_set: int
    pool: int

    @classmethod
    def of(cls, conversations: int) -> "Sizes":
        mean = (INPUT + OUTPUT) * (TURNS + 1) / 2
        working_set = round(conversations * mean / BLOCK)
        return cls(working_set, working_set // FACTOR)

    @property
    def flags(self) -> dict[str, tuple[str, ...]]:
        """By server, what differs; `{folder}` is for files."""
        whole, quarter = 2 * self.working_set * BLOCK_BYTES, self.pool * BLOCK_BYTES
        return {
            OFF: (),
            "host memory": ("--kv-spill", f"host={whole}"),
            "host memory and files": ("--kv-spill", f"host={quarter},disk={{folder}}:{whole}"),
        }


def common_flags(sizes: Sizes) -> tuple[str, ...]:
    return (
        "--load-format", "dummy", "--dtype", "bfloat16", "--block-size", str(BLOCK), "--max-num-seqs", str(ROWS),
        "--max-model-len", str(LONGEST), "--served-model-name", "model", "--disable-log-requests",
        "--kv-cache-memory-bytes", str((sizes.pool + 1) * BLOCK_BYTES), "--disable-log-stats",
    )  # fmt: skip


def workload(conversations: int, count: int, seed: int) -> list[RequestSpec]:
    kind = {"kind": "multi-turn", "turns": TURNS, "input": INPUT, "output": OUTPUT, "conversations": conversations}
    return make_workload(kind, LLAMA["vocab_size"]).requests(count, seed)


def spill_hits(served: Served) -> dict[str, float]:
    """Blocks found in host memory and in files; none without the flag."""
    text = served.client.get("/metrics").text
    found = dict.fromkeys(("host", "disk"), 0.0)
    for tier, value in re.findall(r'^redline:kv_spill_hits_total\{.*tier="(\w+)".*\} (\S+)$', text, re.MULTILINE):
        found[tier] += float(value)
    return found


def measure(
    served: Served, filling: list[RequestSpec], specs: list[RequestSpec], rate: float, seed: int
) -> dict[str, float]:
    """One run: the share of prompt tokens that were found, ms, and the share of those found outside of the KV cache."""
    capacity(served, filling, 2 * ROWS)
    before = {name: served.metric(metric) for name, metric in COUNTERS.items()}
    tiers = spill_hits(served)
    times = arrival_times(rate, len(specs) / rate, point_seed(seed, "arrivals", rate))
    recording = run_load(Target(served.url, "model"), specs, times, observer=Watch(), time_limit_s=RUN_LIMIT_S)
    if checked(recording, len(specs)).health.saturated:
        print(f"the load generator did not keep up: {recording.health.reason} (counted as late)", file=sys.stderr)
    new = {name: served.metric(metric) - before[name] for name, metric in COUNTERS.items()}
    found = latencies(recording.records((-1.0, float("inf"))), float(times[-1]))
    of_tier = {f"{tier}_rate": (now - tiers[tier]) * BLOCK / new["queries"] for tier, now in spill_hits(served).items()}
    return {
        "rate": rate,
        "hit_rate": new["hits"] / new["queries"],
        **of_tier,
        "ttft_p50_ms": float(np.percentile(found.ttft, 50)),
        "ttft_p95_ms": float(np.percentile(found.ttft, 95)),
        "e2e_p50_ms": float(np.percentile(found.e2e, 50)),
        "late": float(recording.health.saturated),  # others had the generator's core
    }


def rows_of(runs: dict[str, list[dict[str, float]]], told: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for server, some in runs.items():
        middle = {key: round(median(run[key] for run in some), 4) for key in some[0]}
        each = {f"{key}_rounds": [round(run[key], 3) for run in some] for key in ("ttft_p50_ms", "ttft_p95_ms")}
        rows.append({"server": server, **middle, "late": int(sum(run["late"] for run in some)), **each} | told)
    return rows


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(
        "evicted blocks", "found", "in host memory", "in files", "TTFT p50", "TTFT p95", "E2E p50", "late rounds"
    )
    for row in rows:
        table.add_row(
            row["server"], f"{row['hit_rate']:.1%}", f"{row['host_rate']:.1%}", f"{row['disk_rate']:.1%}",
            f"{row['ttft_p50_ms']:.1f} ms", f"{row['ttft_p95_ms']:.1f} ms", f"{row['e2e_p50_ms']:.1f} ms",
            str(row["late"]),
        )  # fmt: skip
    console.print(table)


def main() -> None:
    conversations, requests, rounds = (
        int(os.environ.get(*given)) for given in (("CONVERSATIONS", "32"), ("REQUESTS", "120"), ("ROUNDS", "3"))
    )
    load = float(os.environ.get("LOAD", "0.6"))
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)
    sizes = Sizes.of(conversations)
    runs: dict[str, list[dict[str, float]]] = {server: [] for server in sizes.flags}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(LLAMA))
        servers = {
            server: stack.enter_context(
                serve(folder, name, *common_flags(sizes), *(flag.format(folder=folder / "kv") for flag in flags))
            )
            for server, flags in sizes.flags.items()
        }
        most = capacity(servers[OFF], workload(conversations, conversations + requests, 99), 2 * ROWS)
        console.print(f"without the flag {most:.1f} requests/s; {sizes.pool} blocks, working set {sizes.working_set}")
        order = list(servers)
        for turn in range(rounds):
            specs = workload(conversations, conversations + requests, point_seed(turn, "kv", load))
            for server in (*order[turn % 3 :], *order[: turn % 3]):
                run = measure(servers[server], specs[:conversations], specs[conversations:], load * most, turn)
                runs[server].append(run)
                shown = "  ".join(f"{key} {value:.3f}" for key, value in run.items())
                console.print(f"round {turn + 1}  {server:22} {shown}")
    told = {"conversations": conversations, "turns": TURNS, "input": INPUT, "output": OUTPUT, "requests": requests}
    own = hardware()
    machine = f"{own['cpu']}, {own['cores']} core{'s' if own['cores'] > 1 else ''}"
    told |= {"rounds": rounds, "kv_blocks": sizes.pool, "working_set": sizes.working_set, "hardware": machine}
    rows = rows_of(runs, told)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    show(console, rows)
    save_figure(kv_figure, RESULTS, FIGURE)
    console.print(f"rows in {RESULTS}, figure in {FIGURE}")


if __name__ == "__main__":
    main()
