"""`make bench-pause`: how long streams that decode get no token while long prompts come in.

16 streams decode; then four prompts of 1,500 tokens come at once, and the run ends when each has its first token. A gap
is the time between two chunks of one stream as they reach this process. Redline runs as it does by default;
BUDGETS=128,512 adds it with other values of --max-num-batched-tokens. VLLM_PYTHON=… adds vLLM on the CPU, compiled, as
it does by default and with Redline's token budget. Engines take turns: all are started, and those that have no turn are
stopped (SIGSTOP). ROUNDS=8 rounds, each with prompts of its own and beginning with another engine; one more warms up.

Rows go to results/bench-pause.json, and a figure to docs/figures/bench-pause.png: engine, budget, and over the rounds
the median (gap_ms) and the longest (gap_max_ms) of the longest gap of any stream, the median of a stream's longest gap
(stream_gap_ms), the same before the prompts came (before_ms), and the median time until all four had a first token
(prompts_ms). Exit code 1 if Redline's longest gap by default is above 150 ms.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from bench.loadgen import Recording, run_load
from bench.results import RequestRecord
from bench.results.environment import hardware, versions
from bench.target.server import serve_flags
from bench.workloads import make_workload
from bench.workloads.base import RequestSpec
from engine.devices.cpu import CpuMachine
from engine.model.resolve import resolve_model
from tests.perf.bar_charts import save_figure
from tests.perf.client_tools import VLLM_MAIN
from tests.perf.cpu_peers import KV_GB, core_range, vllm_preload
from tests.perf.cpu_process import Server
from tests.perf.cpu_tables import new_table
from tests.perf.pause_figure import pause_figure

RESULTS = Path("results") / "bench-pause.json"
FIGURE = Path("docs") / "figures" / "bench-pause.png"
STREAMS, STREAM_INPUT, STREAM_OUTPUT = 16, 32, 1500
PROMPTS, PROMPT_INPUT = 4, 1500
PROMPTS_AT_S = 2.0  # the streams decode by then
SETTLED_S = 1.0  # their first tokens and what follows from them are over
AFTER_S = 0.5
LIMIT_S = 120.0
GAP_LIMIT_MS = 150.0
DEFAULT_BUDGET = CpuMachine.defaults.max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of one engine; seconds."""

    longest: tuple[float, ...]  # gap of each stream while the prompts were computed
    before: float  # the longest gap of any stream before they came
    prompts: float  # until the last of them had a first token


@dataclass(slots=True)
class Subject:
    engine: str
    budget: int | None  # None: the engine's default
    server: Server
    turns: list[Turn] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.engine if self.budget is None else f"{self.engine}, budget {self.budget}"


def redline(model: Path, budget: int | None, folder: Path) -> Subject:
    given = {"dtype": "bfloat16", "max_model_len": 2048, "kv_cache_memory_bytes": KV_GB << 30}
    serve = [sys.executable, "-m", "cli.main", "serve", str(model), "--port", "{port}", "--disable-log-requests"]
    command = [*serve, "--served-model-name", "model", *serve_flags({**given, "max_num_batched_tokens": budget})]
    name = f"redline-{budget or 'default'}"
    server = Server(name, command, {"PYTHONPATH": os.getcwd()}, folder / f"{name}.log", "model")
    return Subject("Redline", budget, server)


def vllm(python: str, model: Path, budget: int | None, folder: Path) -> Subject:
    env = {
        "VLLM_CPU_OMP_THREADS_BIND": core_range(),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GB),
        "VLLM_TARGET_DEVICE": "cpu",
        "LD_PRELOAD": " ".join(vllm_preload(python)),
    }
    given = {
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": CpuMachine.defaults.max_num_seqs,
        "max_num_batched_tokens": budget,
    }
    serve = [python, "-c", VLLM_MAIN, "serve", str(model), "--port", "{port}", "--host", "127.0.0.1"]
    command = [*serve, "--served-model-name", "model", *serve_flags(given)]
    name = f"vllm-{budget or 'default'}"
    return Subject("vLLM", budget, Server(name, command, env, folder / f"{name}.log", "model"))


class UntilFirstTokens:
    """The load generator's observer: ends the run some time after all requests have a first token."""

    def __init__(self) -> None:
        self._since: float | None = None

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        if self._since is None and first_token == STREAMS + PROMPTS:
            self._since = now_s
        return not failed and (self._since is None or now_s < self._since + AFTER_S)


def specs(vocabulary: int, seed: int) -> list[RequestSpec]:
    streams = {"kind": "random", "input": STREAM_INPUT, "output": STREAM_OUTPUT}
    prompts = {"kind": "random", "input": PROMPT_INPUT, "output": 8}
    return [
        *make_workload(streams, vocabulary).requests(STREAMS, 2 * seed),
        *make_workload(prompts, vocabulary).requests(PROMPTS, 2 * seed + 1),
    ]


def measure(server: Server, vocabulary: int, seed: int) -> Turn:
    times = np.array([0.0] * STREAMS + [PROMPTS_AT_S] * PROMPTS)
    recording = run_load(
        server.target, specs(vocabulary, seed), times, observer=UntilFirstTokens(), time_limit_s=LIMIT_S, processes=1
    )
    return read_turn(server, recording)


def read_turn(server: Server, recording: Recording) -> Turn:
    """The gaps of a run. Ends the program if a request failed."""
    rows = recording.records((-1.0, float("inf")))
    bad = [row for row in rows if row.status not in ("ok", "cut short") or row.ttft_s is None]
    if bad or len(rows) != STREAMS + PROMPTS:
        server.fail(f"{len(bad)} of {len(rows)} requests failed: {bad[0].status} {bad[0].error}" if bad else "too few")
    prompts = [row.intended_s + (row.ttft_s or 0.0) for row in rows[STREAMS:]]
    begin, end = rows[STREAMS].intended_s, max(prompts)
    streams = rows[:STREAMS]
    return Turn(
        tuple(longest_gap(row, begin, end) for row in streams),
        max(longest_gap(row, SETTLED_S, begin) for row in streams),
        end - begin,
    )


def longest_gap(row: RequestRecord, begin: float, end: float) -> float:
    """The longest gap of a stream that overlaps a time, in seconds since the start of the load."""
    arrivals = row.intended_s + (row.ttft_s or 0.0) + np.concatenate(([0.0], np.cumsum(row.chunk_gaps_s)))
    within = (arrivals[1:] > begin) & (arrivals[:-1] < end)
    return float(np.diff(arrivals)[within].max(initial=0.0))


def take_turns(found: Sequence[Subject], vocabulary: int, rounds: int) -> None:
    with ExitStack() as stack:
        for subject in found:
            stack.callback(subject.server.stop)
            subject.server.start()
            subject.server.pause()
        for number in range(rounds + 1):
            first = number % len(found)
            for subject in (*found[first:], *found[:first]):
                subject.server.resume()
                turn = measure(subject.server, vocabulary, number)
                subject.server.pause()
                if number:  # the first one warms up
                    subject.turns.append(turn)
                print(
                    f"round {number or 'warm-up'}  {subject.name:<22} longest gap {1e3 * max(turn.longest):.0f} ms, "
                    f"before {1e3 * turn.before:.0f} ms, prompts after {1e3 * turn.prompts:.0f} ms",
                    flush=True,
                )


def row_of(subject: Subject, model: str) -> dict[str, Any]:
    turns = subject.turns
    worst = [max(turn.longest) for turn in turns]
    own = hardware()
    return {
        "engine": subject.engine, "budget": subject.budget, "model": model, "streams": STREAMS, "prompts": PROMPTS,
        "prompt_tokens": PROMPT_INPUT, "rounds": len(turns),
        "gap_ms": ms(median(worst)), "gap_max_ms": ms(max(worst)), "gaps_ms": [ms(one) for one in worst],
        "stream_gap_ms": ms(median(gap for turn in turns for gap in turn.longest)),
        "before_ms": ms(median(turn.before for turn in turns)),
        "prompts_ms": ms(median(turn.prompts for turn in turns)),
        "hardware": f"{own['cpu']}, {own['cores']} cores", "versions": versions(),
    }  # fmt: skip


def ms(seconds: float) -> float:
    return round(1e3 * seconds, 1)


def show(rows: list[dict[str, Any]]) -> None:
    keys = ("gap_ms", "gap_max_ms", "stream_gap_ms", "before_ms", "prompts_ms")
    table = new_table(f"{STREAMS} streams, {PROMPTS} prompts of {PROMPT_INPUT} tokens", "engine", "budget", *keys)
    for row in rows:
        table.add_row(row["engine"], str(row["budget"] or "default"), *(f"{row[key]:,.1f}" for key in keys))
    Console(width=150, highlight=False).print(table)


def subjects(model: Path, folder: Path) -> list[Subject]:
    budgets = [int(one) for one in os.environ.get("BUDGETS", "").split(",") if one]
    found = [redline(model, budget, folder) for budget in (None, *budgets)]
    if python := os.environ.get("VLLM_PYTHON"):
        found += [vllm(python, model, budget, folder) for budget in (None, DEFAULT_BUDGET)]
    return found


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of what ends the engines
    name = os.environ.get("MODEL", "smollm2-135m")
    model = resolve_model(name)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        found = subjects(model, Path(folder))
        take_turns(found, vocabulary, int(os.environ.get("ROUNDS", "8")))
    rows = [row_of(subject, name) for subject in found]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)
    for path in save_figure(pause_figure, RESULTS, FIGURE):
        print(path)
    if rows[0]["gap_max_ms"] > GAP_LIMIT_MS:
        print(f"FAILED: the longest gap is {rows[0]['gap_max_ms']:g} ms, above {GAP_LIMIT_MS:g} ms")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
