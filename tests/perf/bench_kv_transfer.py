"""`make bench-kv-transfer`: ITL and TTFT with prefill and decode replicas, beside two replicas that do both.

Real servers of a small Llama with random weights: `--prefill-replicas 1 --decode-replicas 1` and `--dp 2`. STREAMS=8
streams run all the time while prompts of PROMPT=1024 tokens, each with an output of 16, arrive with a pause of GAP=1
seconds between two of them. The gaps between tokens of the streams are ITL; TTFT is that of the prompts. Both servers
get the same requests, in turns, in ROUNDS=3; values are medians over rounds. Each server's outputs must be equal.
Prints a table and writes results/bench-kv-transfer.json.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.results.environment import hardware
from tests.perf.bench_routing import LLAMA
from tests.serving import Served, serve

RESULTS = Path("results") / "bench-kv-transfer.json"
WAYS = {
    "prefill and decode": ("--prefill-replicas", "1", "--decode-replicas", "1"),
    "two replicas": ("--dp", "2"),
}
OUTPUT = 16
PROMPTS = 12  # of a round
TIMEOUT_S = 600.0


def flags(prompt: int, streams: int) -> tuple[str, ...]:
    return (
        "--load-format", "dummy", "--dtype", "float32", "--block-size", "16", "--max-num-seqs", str(streams + 8),
        "--max-model-len", str(2 * prompt), "--served-model-name", "model", "--disable-log-requests",
        "--disable-log-stats", "--kv-cache-memory-bytes", "2GiB",
    )  # fmt: skip


class Round:
    """One round against one server."""

    def __init__(self, served: Served, seed: int, prompt: int, streams: int, gap_s: float):
        self._served = served
        self._draw = np.random.default_rng(seed)
        self._prompt, self._streams, self._gap_s = prompt, streams, gap_s
        self.gaps: list[float] = []  # seconds
        self.first: list[float] = []
        self.outputs: list[list[int]] = []

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._served.url, timeout=TIMEOUT_S) as client:
            bodies = [self._body(16, 2 * self._prompt) for _ in range(self._streams)]
            running = [asyncio.ensure_future(self._stream(client, body)) for body in bodies]
            await asyncio.sleep(1.0)
            self.gaps.clear()  # of the streams' own prompts
            asked = []
            for _ in range(PROMPTS):
                asked.append(asyncio.ensure_future(self._ask(client, self._body(self._prompt, OUTPUT))))
                await asyncio.sleep(self._gap_s)
            await asyncio.gather(*asked)
            self.outputs = [one.result() for one in asked]
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _body(self, length: int, tokens: int) -> dict[str, Any]:
        prompt = self._draw.integers(3, LLAMA["vocab_size"], length).tolist()
        most = min(tokens, 2 * self._prompt - length)
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


def main() -> None:
    prompt, streams, rounds = (
        int(os.environ.get(*given)) for given in (("PROMPT", "1024"), ("STREAMS", "8"), ("ROUNDS", "3"))
    )
    gap_s = float(os.environ.get("GAP", "1.0"))
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    transfers = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA))
        servers = {}
        for way, given in WAYS.items():
            (folder / way).mkdir()
            servers[way] = stack.enter_context(serve(folder / way, str(model), *flags(prompt, streams), *given))
        for seed in range(rounds):
            outputs = []
            for way, served in servers.items():
                served.client.post("/reset_prefix_cache", json={}).raise_for_status()
                one = Round(served, seed, prompt, streams, gap_s)
                asyncio.run(one.run())
                found[way].append(one.figures())
                outputs.append(one.outputs)
            if outputs[0] != outputs[1]:
                sys.exit("the outputs differ")
        served = servers["prefill and decode"]
        for name in ("kv_transfers", "kv_transfers_lost", "kv_blocks_received"):
            transfers[name] = served.metric(f"redline:{name}_total")
    told = {"prompt": prompt, "streams": streams, "gap_s": gap_s, "rounds": rounds, **transfers, **hardware()}
    rows = [
        {"way": way, **{key: round(median(run[key] for run in some), 2) for key in some[0]}, **told}
        for way, some in found.items()
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("", "ITL p50", "ITL p99", "ITL max", "TTFT p50", "TTFT p99")
    for row in rows:
        keys = ("itl_p50_ms", "itl_p99_ms", "itl_max_ms", "ttft_p50_ms", "ttft_p99_ms")
        table.add_row(str(row["way"]), *(f"{row[key]:.1f} ms" for key in keys))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
    print(
        "prompts in all, and those of which blocks were lost:",
        transfers["kv_transfers"],
        transfers["kv_transfers_lost"],
    )


if __name__ == "__main__":
    main()
