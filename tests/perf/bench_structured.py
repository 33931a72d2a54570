"""`make bench-structured`: what grammars cost, and what requests without one notice of them.

A server of MODEL (smollm2-135m by default) gets 32 requests at once, in turns of three kinds: all without a grammar,
all with one (a JSON schema that no output completes, so that each has TOKENS tokens), half of them with one. Each
round has each kind once, with prompts of its own. Then masks are computed one by one along the outputs with a grammar.
Rows go to results/bench-structured.json: kind, CPU ms of the server for each token, mean ITL and P99 of the gaps of
the requests without a grammar, ratios to the kind without grammars with their intervals, cost of a mask. ROUNDS=12
names the number of rounds.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from engine.core.grammar_compiler import GrammarCompiler
from engine.frontend.grammar_vocabulary import GrammarVocabulary
from engine.frontend.structured_outputs import StructuredOutputs
from engine.frontend.tokenizer import load_tokenizer
from engine.model.model_info import read_model_info
from engine.model.resolve import resolve_model
from tests.serving import Served, serve

RESULTS = Path("results") / "bench-structured.json"
REQUESTS, INPUT, TOKENS = 32, 16, 96
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "old", "paid"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 200}
KINDS = {"free": 0, "structured": REQUESTS, "half": REQUESTS // 2}  # requests with a grammar


@dataclass(frozen=True, slots=True)
class Streamed:
    text: str
    times: list[float]  # of chunks with text, s
    constrained: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """One kind in one round; of the requests without a grammar, the mean ITL and the P99 of the gaps, NaN if none."""

    cpu_ms: float  # of the server, for each token
    itl_ms: float
    gap_p99_ms: float
    streams: list[Streamed]


async def stream(client: httpx.AsyncClient, prompt: list[int], *, constrained: bool) -> Streamed:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    body |= {"guided_json": SCHEMA} if constrained else {"ignore_eos": True}
    text, times = "", []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return Streamed(text, times, constrained)


def cpu_s(served: Served) -> float:
    process = psutil.Process(served.process.pid)
    return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))


async def take_turn(served: Served, kind: str, random: np.random.Generator) -> Turn:
    prompts = random.integers(100, 10_000, (REQUESTS, INPUT)).tolist()
    limits = httpx.Limits(max_connections=REQUESTS)
    began = cpu_s(served)
    async with httpx.AsyncClient(base_url=served.url, timeout=300, limits=limits) as client:
        every = [stream(client, prompt, constrained=n < KINDS[kind]) for n, prompt in enumerate(prompts)]
        streams = await asyncio.gather(*every)
    seconds = cpu_s(served) - began
    free = [np.array(one.times) for one in streams if not one.constrained]
    gaps = np.concatenate([np.diff(one) for one in free]) if free else np.array([np.nan])
    itl = np.mean([(one[-1] - one[0]) / (TOKENS - 1) for one in free]) if free else np.nan
    return Turn(1e3 * seconds / (REQUESTS * TOKENS), 1e3 * float(itl), 1e3 * float(np.percentile(gaps, 99)), streams)


def mask_costs(model: str, texts: list[str]) -> np.ndarray:
    """Microseconds of the masks along outputs, each with the copy that goes to the workers."""
    folder = resolve_model(model)
    vocab_size = read_model_info(EngineConfig(model=str(folder))).vocab_size
    tokenizer, _ = load_tokenizer(folder, vocab_size, "auto", None)
    compiler = GrammarCompiler(lambda: GrammarVocabulary(tokenizer, vocab_size))
    compiled = compiler.compile(StructuredOutputs(json=SCHEMA).to_grammar())
    costs = []
    for text in texts:
        matcher = compiled.deep_copy()
        for token in tokenizer.encode(text, add_special_tokens=False):
            began = time.perf_counter()
            np.frombuffer(matcher.compute_bitmask(), np.int32).copy()
            costs.append(1e6 * (time.perf_counter() - began))
            if not matcher.consume_token(token):
                break  # the end of a cut output is tokenized otherwise
    return np.array(costs)


def median_interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % interval of the median of independent rounds, by bootstrap."""
    drawn = np.random.default_rng(1).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5)).tolist()
    return low, high


def row_of(kind: str, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    own, base = turns[kind], turns["free"]
    row: dict[str, Any] = {"kind": kind, "requests": REQUESTS, "with_grammar": KINDS[kind], "rounds": len(own)}
    for name in ("cpu_ms", "itl_ms", "gap_p99_ms"):
        values = np.array([getattr(one, name) for one in own])
        ratios = values / np.array([getattr(one, name) for one in base])
        row[name] = float(np.median(values))
        row[f"{name}_ratio"] = float(np.median(ratios))
        row[f"{name}_ratio_low"], row[f"{name}_ratio_high"] = median_interval(ratios)
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}


async def measure(served: Served, rounds: int) -> dict[str, list[Turn]]:
    random = np.random.default_rng(7)
    turns: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    for number in range(-1, rounds):  # the first one warms up
        for kind in KINDS if number % 2 else reversed(KINDS):
            turn = await take_turn(served, kind, random)
            if number >= 0:
                turns[kind].append(turn)
    return turns


def main() -> int:
    model, rounds = os.environ.get("MODEL", "smollm2-135m"), int(os.environ.get("ROUNDS", "12"))
    flags = ("--max-model-len", "512", "--max-num-seqs", str(REQUESTS), "--disable-log-requests")
    with tempfile.TemporaryDirectory() as name, serve(Path(name), model, *flags) as served:
        turns = asyncio.run(measure(served, rounds))
    rows = [row_of(kind, turns) for kind in KINDS]
    texts = [one.text for turn in turns["structured"] for one in turn.streams]
    costs = mask_costs(model, texts[:200])
    p50, p99, most = np.percentile(costs, (50, 99, 100)).tolist()
    rows.append({"kind": "mask", "masks": len(costs), "mask_us_p50": p50, "mask_us_p99": p99, "mask_us_max": most})
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("requests", "CPU ms a token", "ratio", "ITL, ms", "ratio", "P99 of gaps, ms", "ratio")
    for row in rows[:-1]:
        cells = [row["kind"]]
        for name in ("cpu_ms", "itl_ms", "gap_p99_ms"):
            known = row[name] is not None
            cells.append(f"{row[name]:.3f}" if known else "")
            low, high = row[f"{name}_ratio_low"], row[f"{name}_ratio_high"]
            cells.append(f"{row[f'{name}_ratio']:.3f} ({low:.3f}–{high:.3f})" if known else "")
        table.add_row(*cells)
    Console(width=140).print(table)
    print(f"a mask: P50 {p50:.0f} us, P99 {p99:.0f} us, longest {most:.0f} us, of {len(costs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
