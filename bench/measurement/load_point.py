"""One load point: sends a workload at one rate, watches the server, and reduces the responses to one record."""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bench.generators import LostGeneratorError
from bench.loadgen import GeneratorHealth
from bench.measurement.energy import EnergyReader, record_energy
from bench.measurement.generator_columns import generator_columns, generator_records
from bench.measurement.machine import CounterReader, Counters, record_shares
from bench.measurement.server import LoadRecording, ServerUnderTest
from bench.results import GeneratorRecord, Phase, PointRecord, RequestRecord, slug
from bench.search.bracket import round_rate
from bench.search.criteria import Evidence, Verdict, flow_of, judge, overload, tolerance, window_latencies
from bench.search.windows import Timing, is_provisional, phase_repeat
from bench.statistics.intervals import percentile, percentile_interval
from bench.statistics.latencies import Latencies, goodput, latencies, token_rates
from bench.target.metrics import ServerState, StateReader, WindowState, window_state
from bench.workloads import Workload
from bench.workloads.arrivals import Arrivals, point_seed

_DRAIN_LIMIT_S = 30.0
_LOST_SERVER_READINGS = 6  # consecutive readings without a response
INTERRUPTED = "interrupted"
_ENOUGH = "enough seen"  # the window is over and its verdict is clear: no need to wait for the last responses


@dataclass(frozen=True, slots=True)
class PointPlan:
    """What one load point measures; rate in requests/s, times in seconds."""

    rate: float
    phase: Phase
    repeat: int
    timing: Timing
    latency_s: float  # expected E2E latency
    cut_overload: bool  # end early if clearly overloaded
    concurrency: int | None = None  # of a closed loop …
    requests: int | None = None  # … and its number of requests

    @property
    def start_s(self) -> float:
        return self.timing.warmup_s

    @property
    def end_s(self) -> float:
        return self.timing.warmup_s + self.timing.window_s

    @property
    def limit_s(self) -> float:
        return self.end_s + self.timing.drain_s


_ALONE = PointPlan(1.0, "probe", 0, Timing(0.0, 1.0, 0.0), 0.0, cut_overload=False)  # one request


@dataclass(frozen=True, slots=True)
class PointState:
    """The state of a running load point, for display."""

    now_s: float
    sent: int
    first_token: int
    finished: int
    failed: int
    server: ServerState | None


@dataclass(slots=True)
class Watch:
    """The load generator's observer: shows progress and ends the load point on overload, timeout or Ctrl-C."""

    plan: PointPlan
    reader: StateReader
    show: Callable[[PointState], None]
    left_s: Callable[[], float]  # remaining time of the run; 0 once stopped
    stopped: Callable[[], bool] = lambda: False  # by Ctrl-C
    clock: Callable[[], float] = time.monotonic  # the clock of the readings
    cut: str = ""  # why the load point was ended early
    now_s: float = 0.0
    started_at: float = 0.0  # time 0 of the load point on that clock
    _at_start: tuple[int, float | None] | None = None  # open and waiting requests at the start of the window

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        self.now_s = now_s
        self.started_at = self.clock() - now_s
        server = self.reader.latest
        self.show(PointState(now_s, sent, first_token, finished, failed, server))
        self.cut = self._cut(now_s, sent - finished - failed, failed, server)
        return not self.cut

    def _cut(self, now_s: float, backlog: int, failed: int, server: ServerState | None) -> str:
        if self.stopped():
            return INTERRUPTED
        if self.left_s() <= 0:
            return "time"
        if self.reader.failures >= _LOST_SERVER_READINGS and failed:
            return "the server stopped answering"
        if now_s < self.plan.start_s:
            return ""
        if now_s >= self.plan.end_s:
            return _ENOUGH if self._queue_too_long(backlog) else ""
        waiting = server.waiting if server is not None else None
        if self._at_start is None:
            self._at_start = backlog, waiting
        if not self.plan.cut_overload:
            return ""
        if server is not None and self._preempted(server):
            return "preempted"
        queue = None
        if waiting is not None and self._at_start[1] is not None:
            queue = self._at_start[1], waiting
        elapsed = now_s - self.plan.start_s
        return overload((self._at_start[0], backlog), elapsed, self.plan.rate, self.plan.latency_s, queue)

    def _queue_too_long(self, backlog: int) -> bool:
        """Whether a search's window ended with a queue that would take long to drain without new information."""
        if not self.plan.cut_overload or self._at_start is None:
            return False
        in_flight = max(self._at_start[0], self.plan.rate * self.plan.latency_s)
        noise = tolerance(self.plan.rate * self.plan.timing.window_s, in_flight)
        return backlog - self._at_start[0] > 2 * noise

    def _preempted(self, server: ServerState) -> bool:
        begin = self.started_at + self.plan.start_s
        state = window_state(self.reader.states, begin, server.at_s)
        return server.at_s > begin and bool(state.preemptions)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was recorded during a load point; times in seconds since its start."""

    requests: list[RequestRecord]
    window: tuple[float, float]
    server: WindowState
    health: GeneratorHealth
    ended_s: float


class PointRecords(NamedTuple):
    """The records of one load point."""

    point: PointRecord
    requests: list[RequestRecord]
    generators: list[GeneratorRecord]  # on other hosts


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """What the load points of one configuration and workload have in common; run() measures one."""

    server: ServerUnderTest
    workload: Workload
    configuration: str
    reader: StateReader
    seed: int
    precision: float
    left_s: Callable[[], float]
    limits: Mapping[str, float] = field(default_factory=dict)  # column of PointRecord -> highest allowed value
    arrivals: Arrivals = field(default_factory=Arrivals)
    stopped: Callable[[], bool] = lambda: False  # by Ctrl-C
    machine: CounterReader | None = None  # None: other load on the machine is not recorded
    energy: EnergyReader = field(default_factory=EnergyReader)

    def notes(self) -> list[str]:
        """Messages about the trace and the workload's data."""
        notes = self.workload.notes()
        if self.arrivals.trace is not None:
            trace = self.arrivals.read_trace()
            notes = [trace.summary(), trace.skipped, *notes]
        return [note for note in notes if note]

    def run(self, plan: PointPlan, show: Callable[[PointState], None]) -> PointRecords:
        """Send the requests, wait for the responses, judge. The server is drained when this returns."""
        seed = point_seed(self.seed, self.workload.name, plan.rate, phase_repeat(plan.phase, plan.repeat))
        times, needed = _times(plan, seed, self.arrivals)
        specs = self.workload.requests(len(times), seed)
        started = self.server.date()
        self.reader.clear()
        self.energy.clear()
        watch = Watch(plan, self.reader, show, self.left_s, self.stopped, self.server.now)
        before = self.read_machine()
        recording = self.server.run_load(specs, times, observer=watch, time_limit_s=plan.limit_s, needed=needed)
        after = self.read_machine()
        self.reader.read()
        self.reader.started_at = watch.started_at
        record, requests = self._reduce(plan, recording, watch, seed, started)
        record_shares(record, before, after)
        self.record_energy(record, watch.started_at)
        limit_s = self.drain_limit_s
        drain(self.reader, limit_s, self.server)
        if recording.cut_short and self.left_s() > 0:
            with contextlib.suppress(LostGeneratorError):  # this load point is measured; the next one reports it
                self._settle(seed, limit_s)
            self.reader.read()  # so that the counters of the next load point begin after it
        return PointRecords(record, requests, generator_records(record.point_id, recording.health))

    def record_energy(self, record: PointRecord, started_at: float) -> None:
        """Set the columns about energy of a load point that just ended.

        Args:
            started_at: its time 0 on the server's clock.
        """
        now = self.server.now()
        self.energy.read()  # so that readings cover the window up to its end
        start_s = started_at + record.warmup_s
        end_s = min(start_s + record.window_s, now)  # the load ends with the last response, which may be earlier
        record_energy(record, self.energy.joules(start_s, end_s), end_s - start_s)

    @property
    def drain_limit_s(self) -> float:
        return min(_DRAIN_LIMIT_S, max(self.left_s(), 1.0))

    def read_machine(self) -> Counters | None:
        """Read the machine's CPU counters; takes some milliseconds, so it is not done while the load runs."""
        return self.machine.read() if self.machine is not None else None

    def _settle(self, seed: int, limit_s: float) -> None:
        """Send one request for one token; it completes after the steps that still contain closed requests."""
        spec = dataclasses.replace(self.workload.requests(1, seed + 3)[0], output_tokens=1)
        watch = Watch(_ALONE, self.reader, lambda _: None, self.left_s, clock=self.server.now)
        self.server.run_load([spec], np.zeros(1), observer=watch, time_limit_s=limit_s)

    def probe(self, show: Callable[[PointState], None], time_limit_s: float) -> PointRecords:
        """Measure one request alone; the rate is 1 / its E2E latency."""
        seed = point_seed(self.seed, self.workload.name, 0.0, phase_repeat("probe", 0))
        watch = Watch(_ALONE, self.reader, show, self.left_s, clock=self.server.now)
        started = self.server.date()
        specs = self.workload.requests(1, seed)
        recording = self.server.run_load(specs, np.zeros(1), observer=watch, time_limit_s=time_limit_s)
        requests = recording.records((0.0, 1.0))
        alone_s = max((r.e2e_s for r in requests if r.e2e_s is not None), default=1.0)
        measured = Measured(requests, (0.0, alone_s), WindowState(), recording.health, watch.now_s)
        record = self._record(_ALONE, measured)
        record.point_id = point_id(self.configuration, self.workload.name, "probe", 0.0, 0)
        record.rate, record.achieved_rate = round_rate(1 / alone_s), 1 / alone_s
        record.seed, record.started, record.reason = seed, started, "one request alone"
        record.valid = all(r.status == "ok" for r in requests) and bool(requests)
        record.completed = sum(r.status == "ok" for r in requests)
        return PointRecords(record, requests, generator_records(record.point_id, recording.health))

    def _reduce(
        self, plan: PointPlan, recording: LoadRecording, watch: Watch, seed: int, started: str
    ) -> tuple[PointRecord, list[RequestRecord]]:
        start_s, end_s, cut = plan.start_s, plan.end_s, watch.cut
        if cut and watch.now_s < end_s:
            # The window ends at the cut; it is empty if the warm-up was cut.
            end_s = max(start_s, watch.now_s)
        elif cut in ("time", INTERRUPTED, _ENOUGH):
            cut = ""  # the cut came after the window, while waiting for responses
        requests = recording.records((start_s, end_s))
        server = window_state(self.reader.states, watch.started_at + start_s, watch.started_at + end_s)
        measured = Measured(requests, (start_s, end_s), server, recording.health, watch.now_s)
        record = self._record(plan, measured)
        record.seed, record.started = seed, started
        _set_verdict(record, judge(self._evidence(record, measured, cut)))
        if cut == INTERRUPTED and not record.valid:
            record.reason = "the load point was interrupted before its window was over"
        return record, requests

    def _evidence(self, record: PointRecord, measured: Measured, cut: str) -> Evidence:
        inside = [r for r in measured.requests if r.in_window]
        done = [r for r in inside if r.status == "ok"]
        fixed = self.server.fixes_lengths
        return Evidence(
            flow=flow_of(measured.requests, *measured.window),
            server=measured.server,
            failed=Counter(r.status for r in inside if r.status not in ("ok", "cut short")),
            missed_lengths=sum(r.output_tokens != r.asked_output_tokens for r in done) if fixed else 0,
            requests=len(inside),
            client_fault=measured.health.reason,
            load_fault=measured.health.fault,
            cut="time" if cut == INTERRUPTED else cut,
            limits={column: (getattr(record, column), allowed) for column, allowed in self.limits.items()},
            latencies=window_latencies(measured.requests, measured.ended_s),
            precision=self.precision,
            fastest_s=min((r.e2e_s for r in done if r.e2e_s is not None), default=0.0),
        )

    def _record(self, plan: PointPlan, measured: Measured) -> PointRecord:
        requests, window, server = measured.requests, measured.window, measured.server
        window_s = window[1] - window[0]
        inside = [r for r in requests if r.in_window]
        samples = latencies(requests, measured.ended_s)
        input_tok_s, output_tok_s = token_rates(requests, *window)
        completed = flow_of(requests, *window).completed()
        e2e_s = percentile(samples.e2e, 50) / 1e3
        return PointRecord(
            point_id=point_id(self.configuration, self.workload.name, plan.phase, plan.rate, plan.repeat),
            configuration=self.configuration,
            workload=self.workload.name,
            phase=plan.phase,
            rate=plan.rate,
            sustained=None,
            reason="",
            valid=False,
            provisional=is_provisional(self.precision, window_s, len(inside), e2e_s),
            preemptions=server.preemptions,
            requests=len(inside),
            completed=completed,
            failed=sum(r.status not in ("ok", "cut short") for r in inside),
            window_s=window_s,
            achieved_rate=completed / window_s if window_s > 0 else 0.0,
            input_tok_s=input_tok_s,
            output_tok_s=output_tok_s,
            prefix_hit_rate=server.prefix_hit_rate,
            kv_use_max=server.kv_use_max,
            waiting_max=server.waiting_max,
            running_max=server.running_max,
            seed=0,
            started="",
            repeat=plan.repeat,
            warmup_s=window[0],
            tokens_per_chunk=samples.tokens_per_chunk,
            cut_short=samples.cut_short,
            failures=failure_kinds(requests),
            goodput=goodput(requests, self.limits, window_s),
            **_latency_columns(samples),
            **generator_columns(measured.health),
        )


def _latency_columns(samples: Latencies) -> dict[str, Any]:
    """Percentiles in ms, and the intervals of the P99 of TTFT and ITL."""
    columns: dict[str, Any] = {"itl_steps": len(np.unique(samples.itl_steps))}
    for name in ("ttft", "itl", "tpot", "e2e"):
        values = getattr(samples, name)
        columns |= {f"{name}_p{share}_ms": percentile(values, share) for share in (50, 99)}
        if name in ("ttft", "itl"):
            steps = samples.itl_steps if name == "itl" else None
            columns[f"{name}_p99_low_ms"], columns[f"{name}_p99_high_ms"] = percentile_interval(values, 99, steps)
    return columns


def failure_kinds(requests: list[RequestRecord]) -> str:
    """The number of failed requests by kind: "connection:3;http 429:12". Requests cut short by the run did not fail."""
    kinds = Counter(r.status for r in requests if r.status not in ("ok", "cut short"))
    return ";".join(f"{kind}:{count}" for kind, count in sorted(kinds.items()))


def point_id(configuration: str, workload: str, phase: Phase, rate: float, repeat: int) -> str:
    """The name of a load point and its files; the same when an interrupted run is continued."""
    again = f"-{repeat}" if repeat else ""
    return f"{slug(configuration)}_{slug(workload)}_{phase}-{rate:.4g}{again}"


def drain(reader: StateReader, limit_s: float, server: ServerUnderTest) -> bool:
    """Wait until the server is idle; returns whether it is. Without metrics, it is assumed to be idle after a pause."""
    end = server.now() + limit_s
    while reader.available:
        state = reader.read()
        if state is None or not ((state.running or 0) + (state.waiting or 0)):
            return True
        if server.now() >= end:
            return False
        server.sleep(0.1)
    server.sleep(min(0.3, limit_s))
    return True


def _times(plan: PointPlan, seed: int, arrivals: Arrivals) -> tuple[np.ndarray, int]:
    """Send times, and the number of first requests that must complete before the load point ends.

    Requests are sent after the window until its last request completes, so that its last requests see the same load as
    its first ones.
    """
    timing = plan.timing
    times = arrivals.schedule(plan.rate, (timing.warmup_s, timing.window_s, timing.drain_s), seed)
    return times, int(np.searchsorted(times, plan.end_s))


def _set_verdict(record: PointRecord, verdict: Verdict) -> None:
    record.valid = verdict.valid
    record.sustained = verdict.sustained
    record.reason = verdict.reason
    record.binding = verdict.binding
    record.backlog_growth, record.backlog_noise = verdict.growth, verdict.noise
    record.verdict, record.ttft_trend = verdict.name, verdict.ttft_trend
