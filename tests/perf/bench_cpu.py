"""`make bench-cpu`: Redline on the CPU beside vLLM, OpenVINO GenAI and llama.cpp, in turns, and beside the limit.

    128/128x64, 500/128x32   so many requests of INPUT/OUTPUT tokens all at once, wall time until the last token
    single                   one request of 128/128, tokens 2..N over their time
    online-4, online-6       over HTTP: 48 requests of 128/128, Poisson arrivals, so many a second

The same random prompts for every engine, greedy, without end-of-sequence. Where an engine has a Python API, the first
three go through it (tests/perf/cpu_child.py); llama.cpp's go through its server. cpu_peers.py says which variables name
the peers, and how their files are made.

First each engine is started alone: memory (PSS of all its processes after 128/128x64) and what it costs when idle.
Then all of them are started again, from files in memory now (ready_s: to the first token), and take turns a workload
at a time; who has no turn is stopped (SIGSTOP). Medians over ROUNDS=3. ONLY=redline,vllm,openvino,llama picks engines,
WORKLOADS=single,online-4 workloads, MODEL=… another model; REQUESTS=8 caps the requests, to see that all of it runs.
Prints tables and writes results/bench-cpu.json.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from bench.results.environment import hardware
from bench.statistics.latencies import latencies
from bench.workloads import make_workload
from bench.workloads.arrivals import arrival_times, point_seed
from bench.workloads.base import RequestSpec
from engine.model.resolve import resolve_model
from tests.perf.cpu_limits import Machine, Shape, measure_machine
from tests.perf.cpu_peers import Subject, cores, subjects
from tests.perf.cpu_process import Child, Engine, Server
from tests.perf.cpu_tables import show

RESULTS = Path("results") / "bench-cpu.json"
FILE_WIDTH = 150
IDLE_S = 5.0
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Workload:
    name: str
    input: int
    output: int
    requests: int
    rate: float | None = None  # of arrivals over HTTP; None: all at once

    @property
    def single(self) -> bool:
        return self.requests == 1


BATCH = Workload("128/128x64", 128, 128, 64)
WORKLOADS = (
    BATCH,
    Workload("500/128x32", 500, 128, 32),
    Workload("single", 128, 128, 1),
    Workload("online-4", 128, 128, 48, rate=4.0),
    Workload("online-6", 128, 128, 48, rate=6.0),
)


@dataclass(slots=True)
class Form:
    """A subject's Python API or its server: what was measured of it."""

    subject: Subject
    engine: Engine
    memory_mb: float = 0.0
    idle_cpu_percent: float = 0.0
    first_start_s: float = 0.0
    runs: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # by workload


@dataclass(frozen=True, slots=True)
class Plan:
    model: Path
    vocabulary: int
    rounds: int
    workloads: tuple[Workload, ...]
    cap: int | None  # requests of a workload at most

    def specs(self, workload: Workload, seed: int, output: int | None = None) -> list[RequestSpec]:
        count = workload.requests if self.cap is None else min(self.cap, workload.requests)
        kind = {"kind": "random", "input": workload.input, "output": output or workload.output}
        return make_workload(kind, self.vocabulary).requests(count, point_seed(seed, workload.name, workload.rate or 0))


def measure(engine: Engine, workload: Workload, specs: list[RequestSpec], seed: int) -> dict[str, float]:
    """One run: output_tok_s, and ms over HTTP."""
    if workload.rate is not None:
        assert isinstance(engine, Server)
        return online(engine, workload.rate, specs, seed)
    if isinstance(engine, Child):
        answer = engine.generate(specs, stream=workload.single)
        if workload.single:
            return {"output_tok_s": answer["later_tokens"] / answer["later_s"], "ttft_p50_ms": answer["first_s"] * 1e3}
        return {"output_tok_s": answer["tokens"] / answer["wall_s"]}
    assert isinstance(engine, Server)
    rows = engine.all_at_once(specs).records((-1.0, float("inf")))
    if workload.single:
        (row,) = rows
        rate = sum(row.chunk_tokens[1:]) / sum(row.chunk_gaps_s)
        return {"output_tok_s": rate, "ttft_p50_ms": (row.ttft_s or 0.0) * 1e3}
    return {"output_tok_s": sum(row.output_tokens for row in rows) / wall_s(rows)}


def online(engine: Server, rate: float, specs: list[RequestSpec], seed: int) -> dict[str, float]:
    """The rate is over the time from the first request sent to the end of the last."""
    times = arrival_times(rate, len(specs) / rate, point_seed(seed, "arrivals", rate))
    recording = engine.load(specs, times)
    if recording.health.saturated:
        print(f"{engine.name}: the load generator did not keep up: {recording.health.reason}", file=sys.stderr)
    rows = recording.records((-1.0, float("inf")))
    found = latencies(rows, wall_s(rows))
    return {
        "output_tok_s": sum(row.output_tokens for row in rows) / wall_s(rows),
        "ttft_p50_ms": float(np.percentile(found.ttft, 50)),
        "itl_p50_ms": float(np.percentile(found.itl, 50)),
        "itl_p99_ms": float(np.percentile(found.itl, 99)),
        "tokens_per_chunk": found.tokens_per_chunk,
    }


def wall_s(rows: Sequence[Any]) -> float:
    """To the last token, from the first request sent."""
    ends = [row.intended_s + row.ttft_s + sum(row.chunk_gaps_s) for row in rows]
    return float(max(ends) - min(row.intended_s for row in rows))


# ---------------------------------------------------------------------------------------------------------- the run


def make_forms(found: Sequence[Subject], plan: Plan, folder: Path) -> tuple[list[Form], list[Form]]:
    """For the offline and the online workloads; a server may be both."""
    is_offline = any(workload.rate is None for workload in plan.workloads)
    is_online = any(workload.rate is not None for workload in plan.workloads)
    offline, online = [], []
    for subject in found:
        server = Form(subject, subject.make_server(folder)) if subject.server else None
        if is_offline:
            form = Form(subject, subject.make_child(folder)) if subject.child else server
            assert form is not None, f"{subject.name} has neither child nor server"
            offline.append(form)
        if is_online and server is not None:
            online.append(server)
    return offline, online


def alone(form: Form, plan: Plan) -> None:
    """What is only true of an engine with the machine to itself; it also leaves its files in memory."""
    engine = form.engine
    engine.start()
    try:
        measure(engine, BATCH, plan.specs(BATCH, -1), -1)
        form.memory_mb = engine.pss_mb()
        form.idle_cpu_percent = engine.idle_cpu_percent(IDLE_S)
        form.first_start_s = engine.ready_s
    finally:
        engine.stop()
    print(
        f"{form.engine.name}, alone: {form.memory_mb:,.0f} MB, idle {form.idle_cpu_percent:.1f} % of a core, "
        f"first token after {form.first_start_s:.1f} s",
        flush=True,
    )


@contextmanager
def all_started(forms: Sequence[Form]) -> Iterator[None]:
    with ExitStack() as stack:
        for form in forms:
            stack.callback(form.engine.stop)
            form.engine.start()
            form.engine.pause()
        yield


def take_turns(forms: Sequence[Form], plan: Plan, online: bool, machines: list[Machine]) -> None:
    """Each round begins with another engine: what a neighbour on the machine does hits them all."""
    workloads = [workload for workload in plan.workloads if (workload.rate is not None) == online]
    if not forms or not workloads:
        return
    with all_started(forms):
        for number in range(plan.rounds):
            machines.append(measure_machine(len(cores())))
            for workload in workloads:
                for form in (*forms[number % len(forms) :], *forms[: number % len(forms)]):
                    turn(form, workload, plan, number)


def turn(form: Form, workload: Workload, plan: Plan, number: int) -> None:
    engine = form.engine
    engine.resume()
    try:
        if number == 0:
            measure(engine, workload, plan.specs(workload, -2, WARM_UP_TOKENS), -2)
        run = measure(engine, workload, plan.specs(workload, number), number)
    finally:
        engine.pause()
    form.runs.setdefault(workload.name, []).append(run)
    shown = "  ".join(f"{key} {value:,.1f}" for key, value in run.items())
    print(f"round {number + 1}  {workload.name:<11} {engine.name:<22} {shown}", flush=True)


# ------------------------------------------------------------------------------------------------------------- rows


def rows_of(form: Form, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    subject = form.subject
    told = form.engine.versions | ({"build": subject.version} if subject.version else {})
    for workload, runs in form.runs.items():
        middle = {key: round(median(run[key] for run in runs), 3) for key in runs[0]}
        rates = [run["output_tok_s"] for run in runs]
        yield {
            "engine": subject.engine,
            "precision": subject.precision,
            "mode": subject.mode,
            "workload": workload,
            "output_tok_s": middle["output_tok_s"],
            "output_tok_s_low": round(min(rates), 3),
            "output_tok_s_high": round(max(rates), 3),
            "ready_s": round(form.engine.ready_s, 2),
            "first_start_s": round(form.first_start_s, 2),
            "memory_mb": round(form.memory_mb, 1),
            "idle_cpu_percent": round(form.idle_cpu_percent, 2),
            "ttft_p50_ms": middle.get("ttft_p50_ms"),
            "itl_p50_ms": middle.get("itl_p50_ms"),
            "itl_p99_ms": middle.get("itl_p99_ms"),
            "tokens_per_chunk": middle.get("tokens_per_chunk"),
            "rounds": len(runs),
            "form": "server" if isinstance(form.engine, Server) else "python",
            "versions": told,
            "settings": subject.settings,
            "hardware": machine,
        }


def limit_rows(plan: Plan, machines: Sequence[Machine], told: dict[str, Any]) -> list[dict[str, Any]]:
    if not machines:
        return []
    shape = Shape.read(plan.model)
    middle = Machine(median(m.read_gb_s for m in machines), median(m.gemm_tflop_s for m in machines))
    figures = {"read_gb_s": round(middle.read_gb_s, 2), "gemm_tflop_s": round(middle.gemm_tflop_s, 3)}
    found = []
    for workload in plan.workloads:
        if workload.rate is None:
            count = len(plan.specs(workload, 0))
            rate = shape.output_tok_s(middle, count, workload.input, workload.output, decode_only=workload.single)
            row: dict[str, Any] = {"engine": "limit", "precision": "bfloat16", "mode": "", "workload": workload.name}
            row |= {"output_tok_s": round(rate, 2), "ready_s": None, "memory_mb": None, "ttft_p50_ms": None}
            found.append(row | {"itl_p99_ms": None} | figures | {"hardware": told})
    return found


def make_plan() -> Plan:
    asked = os.environ.get("WORKLOADS", "").split(",") if os.environ.get("WORKLOADS") else []
    known = {workload.name: workload for workload in WORKLOADS}
    for name in asked:
        if name not in known:
            sys.exit(f"WORKLOADS={name}: choose from {', '.join(known)}")
    model = resolve_model(os.environ.get("MODEL", "smollm2-135m"))
    cap = os.environ.get("REQUESTS")
    return Plan(
        model=model,
        vocabulary=json.loads((model / "config.json").read_text())["vocab_size"],
        rounds=int(os.environ.get("ROUNDS", "3")),
        workloads=tuple(known[name] for name in asked) or WORKLOADS,
        cap=int(cap) if cap else None,
    )


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of what ends the engines
    plan = make_plan()
    only = [name for name in os.environ.get("ONLY", "").split(",") if name]
    found = subjects(plan.model, only)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    machines: list[Machine] = []
    with tempfile.TemporaryDirectory() as name:
        offline, online = make_forms(found, plan, Path(name))
        for form in [*offline, *(form for form in online if form not in offline)]:
            alone(form, plan)
        take_turns(offline, plan, False, machines)
        take_turns(online, plan, True, machines)
    told = hardware()
    rows = limit_rows(plan, machines, told)
    for form in [*offline, *(form for form in online if form not in offline)]:
        rows += rows_of(form, told)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    show(console, rows)
    console.print(f"rows in {RESULTS}")


if __name__ == "__main__":
    main()
