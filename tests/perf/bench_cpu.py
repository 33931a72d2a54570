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
What the machine itself allows (cpu_limits.py) is measured before all engines, before each round, and after them.

Prints tables and writes results/bench-cpu.json after each turn: a run that is interrupted or killed loses nothing that
it has measured. `complete` is false in all rows until the run has come to its end. If a request of an engine fails, its
turn counts for nothing, `failures` says why, and the run goes on.
"""

import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.statistics.latencies import latencies
from bench.workloads.arrivals import arrival_times, point_seed
from bench.workloads.base import RequestSpec
from tests.perf.cpu_limits import measure_machine
from tests.perf.cpu_peers import Subject, asked_engines, cores, subjects
from tests.perf.cpu_plan import BATCH, Plan, Workload, make_plan
from tests.perf.cpu_process import Child, Engine, RequestsFailed, Server
from tests.perf.cpu_results import Form, Results
from tests.perf.cpu_tables import show

RESULTS = Path("results") / "bench-cpu.json"
FILE_WIDTH = 150
IDLE_S = 5.0
WARM_UP_TOKENS = 8


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
    ttft = float(np.percentile(found.ttft, 50))
    return {**token_figures(rows), "ttft_p50_ms": ttft, "tokens_per_chunk": found.tokens_per_chunk}


def token_figures(rows: Sequence[Any]) -> dict[str, float]:
    """Throughput and times between tokens of a run over HTTP."""
    itl = latencies(rows, wall_s(rows)).itl
    return {
        "output_tok_s": sum(row.output_tokens for row in rows) / wall_s(rows),
        "itl_p50_ms": float(np.percentile(itl, 50)),
        "itl_p99_ms": float(np.percentile(itl, 99)),
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


@contextmanager
def all_started(forms: Sequence[Form]) -> Iterator[None]:
    with ExitStack() as stack:
        for form in forms:
            stack.callback(form.engine.stop)
            form.engine.start()
            form.engine.pause()
        yield


class Run:
    """Runs a plan; each result is in the file before the next one is measured."""

    def __init__(self, plan: Plan, offline: Sequence[Form], online: Sequence[Form], console: Console):
        self.forms = [*offline, *(form for form in online if form not in offline)]
        self.results = Results(RESULTS, plan, self.forms)
        self._plan = plan
        self._parts = [
            (forms, [workload for workload in plan.workloads if (workload.rate is not None) == over_http])
            for forms, over_http in ((offline, False), (online, True))
        ]
        turns = plan.rounds * sum(len(forms) * len(workloads) for forms, workloads in self._parts)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("", total=len(self.forms) + turns)

    def __call__(self) -> None:
        with self._progress:
            self._measure_machine("the machine, before all")
            for form in self.forms:
                self._alone(form)
            for forms, workloads in self._parts:
                if forms and workloads:
                    self._take_turns(forms, workloads)
            self._measure_machine("the machine, after all")
            self.results.write(complete=True)

    def _measure_machine(self, when: str) -> None:
        self._progress.update(self._task, description=when)
        machine = measure_machine(len(cores()))
        self.results.add_machine(machine)
        self._print(f"{when}: {machine.read_gb_s:.1f} GB/s read, {machine.gemm_tflop_s:.2f} TFLOP/s in bf16 products")

    def _alone(self, form: Form) -> None:
        """What is only true of an engine with the machine to itself; it also leaves its files in memory."""
        engine = form.engine
        self._progress.update(self._task, description=f"{engine.name}, alone")
        engine.start()
        try:
            measure(engine, BATCH, self._plan.specs(BATCH, -1), -1)
            form.memory_mb = engine.pss_mb()
            form.idle_cpu_percent = engine.idle_cpu_percent(IDLE_S)
            form.first_start_s = engine.ready_s
        finally:
            engine.stop()
        self._add(
            f"{engine.name}, alone: {form.memory_mb:,.0f} MB, idle {form.idle_cpu_percent:.1f} % of a core, "
            f"first token after {form.first_start_s:.1f} s"
        )

    def _take_turns(self, forms: Sequence[Form], workloads: Sequence[Workload]) -> None:
        """Each round begins with another engine: what a neighbor on the machine does hits them all."""
        self._progress.update(self._task, description="starts all engines")
        with all_started(forms):
            for number in range(self._plan.rounds):
                self._measure_machine(f"the machine, before round {number + 1}")
                for workload in workloads:
                    for form in (*forms[number % len(forms) :], *forms[: number % len(forms)]):
                        self._turn(form, workload, number)

    def _turn(self, form: Form, workload: Workload, number: int) -> None:
        engine, plan = form.engine, self._plan
        what = f"round {number + 1}  {workload.name:<11} {engine.name:<22}"
        self._progress.update(self._task, description=what)
        engine.resume()
        try:
            if number == 0:
                measure(engine, workload, plan.specs(workload, -2, WARM_UP_TOKENS), -2)
            run = measure(engine, workload, plan.specs(workload, number), number)
        except RequestsFailed as error:
            form.failures.setdefault(workload.name, []).append(str(error).partition(";")[0])
            self._add(f"{what} failed: {error}")
            return
        finally:
            engine.pause()
        form.runs.setdefault(workload.name, []).append(run)
        self._add(f"{what} {'  '.join(f'{key} {value:,.1f}' for key, value in run.items())}")

    def _add(self, line: str) -> None:
        self.results.write()
        self._print(line)
        self._progress.advance(self._task)

    def _print(self, line: str) -> None:
        self._progress.console.print(line, soft_wrap=True)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of what ends the engines
    plan = make_plan()
    found = subjects(plan.model, asked_engines())
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    with tempfile.TemporaryDirectory() as name:
        offline, online = make_forms(found, plan, Path(name))
        run = Run(plan, offline, online, console)
        try:
            run()
        except KeyboardInterrupt:
            console.print(f"interrupted; what was measured is in {RESULTS}")
            return 130
    show(console, run.results.rows)
    console.print(f"rows in {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
