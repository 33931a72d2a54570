"""`make bench-kv-transfer`: ITL and TTFT with prefill and decode replicas, beside two replicas that do both.

Real servers of a small Llama with random weights: `--prefill-replicas 1 --decode-replicas 1` and `--dp 2`. STREAMS=8
streams run all the time while PROMPTS=24 prompts of PROMPT=1024 tokens, each with an output of 16, arrive with a pause
of GAP=1 seconds between two of them. The gaps between tokens of the streams are ITL; TTFT is that of the prompts. Both
servers get the same requests, in turns, in ROUNDS=6; values are medians over rounds. Each server's outputs must be
equal. Takes about 6 minutes. Each round is printed and written to results/bench-kv-transfer.json when it ends, where
the numbers of each round are beside the medians; at the end docs/figures/bench-kv-transfer.png is drawn.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.results.environment import hardware
from tests.perf.bar_charts import save_figure
from tests.perf.bench_routing import LLAMA
from tests.perf.kv_transfer_figure import kv_transfer_figure
from tests.serving import Served, serve

RESULTS, FIGURE = Path("results") / "bench-kv-transfer.json", Path("docs") / "figures" / "bench-kv-transfer.png"
DIVIDED = "prefill and decode"
WAYS = {
    DIVIDED: ("--prefill-replicas", "1", "--decode-replicas", "1"),
    "two replicas": ("--dp", "2"),
}
OUTPUT = 16
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Load:
    """What a round sends: streams that run all the time, and prompts, `gap_s` seconds apart, of `prompt` tokens."""

    prompt: int
    streams: int
    prompts: int
    gap_s: float

    @classmethod
    def given(cls) -> "Load":
        prompt, streams, prompts = (
            int(os.environ.get(*given)) for given in (("PROMPT", "1024"), ("STREAMS", "8"), ("PROMPTS", "24"))
        )
        return cls(prompt, streams, prompts, float(os.environ.get("GAP", "1.0")))


def flags(load: Load) -> tuple[str, ...]:
    return (
        "--load-format", "dummy", "--dtype", "float32", "--block-size", "16", "--max-num-seqs", str(load.streams + 8),
        "--max-model-len", str(2 * load.prompt), "--served-model-name", "model", "--disable-log-requests",
        "--disable-log-stats", "--kv-cache-memory-bytes", "2GiB",
    )  # fmt: skip


class Round:
    """One round against one server."""

    def __init__(self, served: Served, seed: int, load: Load):
        self._served = served
        self._draw = np.random.default_rng(seed)
        self._load = load
        self.gaps: list[float] = []  # seconds
        self.first: list[float] = []
        self.outputs: list[list[int]] = []

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._served.url, timeout=TIMEOUT_S) as client:
            bodies = [self._body(16, 2 * self._load.prompt) for _ in range(self._load.streams)]
            running = [asyncio.ensure_future(self._stream(client, body)) for body in bodies]
            await asyncio.sleep(1.0)
            self.gaps.clear()  # of the streams' own prompts
            asked = []
            for _ in range(self._load.prompts):
                asked.append(asyncio.ensure_future(self._ask(client, self._body(self._load.prompt, OUTPUT))))
                await asyncio.sleep(self._load.gap_s)
            await asyncio.gather(*asked)
            self.outputs = [one.result() for one in asked]
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _body(self, length: int, tokens: int) -> dict[str, Any]:
        prompt = self._draw.integers(3, LLAMA["vocab_size"], length).tolist()
        most = min(tokens, 2 * self._load.prompt - length)
        return {
            "model": "model", "prompt": prompt, "max_tokens": most, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        while True:
            last = None
            async for _ in self._chunks(client, body):
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append(now - last)
                last = now

    async def _ask(self, client: httpx.AsyncClient, body: dict[str, Any]) -> list[int]:
        began, tokens = time.perf_counter(), list[int]()
        async for chunk in self._chunks(client, body):
            if not tokens:
                self.first.append(time.perf_counter() - began)
            tokens += chunk["choices"][0].get("token_ids") or []
        if len(tokens) != OUTPUT:
            sys.exit(f"an output has {len(tokens)} tokens instead of {OUTPUT}")
        return tokens

    async def _chunks(self, client: httpx.AsyncClient, body: dict[str, Any]) -> Any:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    if chunk["choices"]:
                        yield chunk

    def figures(self) -> dict[str, float]:
        """Milliseconds."""
        found = {}
        for name, values in (("itl", self.gaps), ("ttft", self.first)):
            for percent in (50, 99):
                found[f"{name}_p{percent}_ms"] = float(1000 * np.percentile(values, percent))
        found["itl_max_ms"] = 1000 * max(self.gaps)
        return found


def rows_of(found: dict[str, list[dict[str, float]]], told: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each way, with the medians over its rounds and the values of each."""
    rows = []
    for way, runs in found.items():
        middle = {key: round(median(run[key] for run in runs), 2) for key in runs[0]}
        each = {f"{key}_rounds": [round(run[key], 2) for run in runs] for key in runs[0]}
        rows.append({"way": way, **middle, **each, "rounds": len(runs), **told})
    return rows


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table("", "ITL p50", "ITL p99", "ITL max", "TTFT p50", "TTFT p99")
    for row in rows:
        keys = ("itl_p50_ms", "itl_p99_ms", "itl_max_ms", "ttft_p50_ms", "ttft_p99_ms")
        table.add_row(str(row["way"]), *(f"{row[key]:.1f} ms" for key in keys))
    console.print(table)


def start(stack: ExitStack, folder: Path, load: Load) -> dict[str, Served]:
    """The servers by their way."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    servers = {}
    for way, given in WAYS.items():
        (folder / way).mkdir()
        servers[way] = stack.enter_context(serve(folder / way, str(model), *flags(load), *given))
    return servers


def main() -> None:
    load = Load.given()
    rounds = int(os.environ.get("ROUNDS", "6"))
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    own = hardware()
    told: dict[str, Any] = {**asdict(load), "output": OUTPUT}
    told["hardware"] = f"{own['cpu']}, {own['cores']} core{'s' if own['cores'] > 1 else ''}"
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        servers = start(stack, Path(name), load)
        for seed in range(rounds):
            outputs = []
            order = list(servers)[:: 1 if seed % 2 == 0 else -1]
            for way in order:
                servers[way].client.post("/reset_prefix_cache", json={}).raise_for_status()
                one = Round(servers[way], seed, load)
                asyncio.run(one.run())
                found[way].append(one.figures())
                outputs.append(one.outputs)
                values = "  ".join(f"{key} {value:.1f}" for key, value in one.figures().items())
                console.print(f"round {seed + 1} of {rounds}  {way:18} {values}", soft_wrap=True)
            if outputs[0] != outputs[1]:
                sys.exit("the outputs differ")
            served = servers[DIVIDED]
            for counter in ("kv_transfers", "kv_transfers_lost", "kv_blocks_received"):
                told[counter] = served.metric(f"redline:{counter}_total")
            RESULTS.write_text(json.dumps(rows := rows_of(found, told), indent=1) + "\n")
    show(console, rows)
    console.print(f"prompts in all {told['kv_transfers']:g}, of which blocks were lost {told['kv_transfers_lost']:g}")
    save_figure(kv_transfer_figure, RESULTS, FIGURE)
    console.print(f"rows in {RESULTS}, figure in {FIGURE}")


if __name__ == "__main__":
    main()
