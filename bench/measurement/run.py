"""Measures one configuration with one workload: probe, search or given rates, ladder; saves every load point."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType

from bench.errors import BenchError
from bench.generators import LostGeneratorError
from bench.measurement.energy import EnergyMeter, EnergyReader
from bench.measurement.load_point import LoadPoint, PointPlan, point_id
from bench.measurement.progress import Progress, duration
from bench.measurement.server import ServerUnderTest
from bench.results import Answer, Phase, PointRecord, RequestRecord, RunFiles
from bench.results.writing import CannotWriteError
from bench.search.bracket import Trial, round_rate
from bench.search.search import answer_of_rates, find_sustained
from bench.search.windows import Planner, TimeBudget, Timing, ladder_rates
from bench.workloads import Workload
from bench.workloads.arrivals import Arrivals

_SECOND_PROBE_BELOW_S = 5.0
_PROBE_LIMIT_S = 600.0
_LADDER_LATENCIES = 4.0  # x the latency of one request alone


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How to measure; the same for all configurations that are compared."""

    seed: int = 0
    precision: float = 0.1  # 0..1
    max_minutes: float = 15.0
    rates: Sequence[float] | None = None  # requests/s; None: search
    ladder: bool = True
    ladder_rates: Sequence[float] | None = None  # None: 0.25 … 1.5 x the rate found
    round: int = 0  # of several rounds over the ladder or the given rates; each has other requests
    window_s: float | None = None  # None: planned from precision and time
    warmup_s: float | None = None  # None: planned from the expected latency
    limits: Mapping[str, float] = field(default_factory=dict)  # column of PointRecord -> highest allowed value
    arrivals: Arrivals = field(default_factory=Arrivals)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured and how, and where results and progress go."""

    server: ServerUnderTest
    workload: Workload
    configuration: str
    options: BenchOptions
    files: RunFiles
    progress: Progress
    meter: EnergyMeter | None = None  # None: energy is not measured


class InterruptedRunError(KeyboardInterrupt):
    """Ctrl-C; `answer` is what was found until then, None if nothing; everything measured is on disk."""

    def __init__(self, answer: Answer | None):
        super().__init__("interrupted")
        self.answer = answer


class LostServerError(BenchError):
    """The server stopped answering, or a generator is gone; `answer` as of InterruptedRunError."""

    def __init__(self, message: str, answer: Answer | None = None):
        super().__init__(message)
        self.answer = answer


def measure_configuration(subject: Subject, finished: Sequence[PointRecord] = ()) -> Answer | None:
    """Measure and save every load point; returns the answer, None if no load point is valid.

    `finished` are load points of an interrupted run, which are not measured again. Raises InterruptedRunError (Ctrl-C),
    LostServerError and CannotWriteError, with the answer so far, and BenchError if the probe fails.
    """
    options, configuration, workload = subject.options, subject.configuration, subject.workload.name
    with _open_run(subject, finished) as run:
        latency_s = run.probe()
        if options.rates is not None:
            run.report_fixed_plan(options.rates, latency_s)
            run.records.extend(r for r in finished if r.phase == "fixed" and r.repeat < options.round and run.owns(r))
            run.run_rates("fixed", options.rates, options.round)
            run.answer = answer_of_rates(run.records_of("fixed"), configuration, workload)
        else:
            start = round_rate(1 / latency_s)
            run.report_search_plan(start, latency_s)
            answer, _ = find_sustained(
                run.measure, start_rate=start, precision=options.precision,
                configuration=configuration, workload=workload,
            )  # fmt: skip
            run.answer = answer
            if options.ladder:
                run.ladder(options.ladder_rates)
    new = [r for r in run.records if r.phase != "probe" and (options.rates is None or r.repeat >= options.round)]
    return run.answer if any(r.valid for r in new) else None


def measure_ladder(subject: Subject, finished: Sequence[PointRecord] = ()) -> list[PointRecord]:
    """Measure only `ladder_rates` of the options, within `max_minutes`; returns their records."""
    if not subject.options.ladder_rates:
        raise ValueError("ladder_rates must be given")
    with _open_run(subject, finished) as run:
        run.probe()
        run.records.extend(r for r in finished if r.phase in ("search", "confirm") and run.owns(r))
        run.ladder(subject.options.ladder_rates, subject.options.round)
    return run.records_of("ladder")


@contextlib.contextmanager
def _open_run(subject: Subject, finished: Sequence[PointRecord]) -> Iterator["_Run"]:
    """The run, with its metrics reader and its handling of Ctrl-C. If it ended early, the cause is raised on exit."""
    server, options = subject.server, subject.options
    budget = TimeBudget(options.max_minutes * 60, server.now)
    budget.start()
    with stop_on_interrupt(budget), server.open_reader() as reader, EnergyReader(subject.meter) as energy:
        point = LoadPoint(
            server, subject.workload, subject.configuration, reader, options.seed, options.precision, budget.left_s,
            options.limits, options.arrivals, lambda: budget.stopped, server.open_machine(), energy,
        )  # fmt: skip
        planner = Planner(
            budget, options.precision, options.ladder and options.rates is None, options.window_s,
            server.warmup_latencies, options.warmup_s,
        )  # fmt: skip
        known = {r.point_id: r for r in finished if _reusable(r)}
        run = _Run(point, planner, subject.files, subject.progress, known)
        yield run
    if run.unwritten:
        raise CannotWriteError(run.unwritten, run.answer_so_far)
    if run.lost:
        raise LostServerError(run.lost, run.answer_so_far)
    if budget.stopped:
        raise InterruptedRunError(run.answer_so_far)


@contextlib.contextmanager
def stop_on_interrupt(budget: TimeBudget) -> Iterator[None]:
    """Let the first Ctrl-C (or SIGTERM) stop the budget; a second one raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        if budget.stopped:
            raise KeyboardInterrupt
        budget.stopped = True

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


class _Run:
    """The measurement of one configuration and workload; `records` are its load points so far."""

    def __init__(
        self, point: LoadPoint, planner: Planner, files: RunFiles, progress: Progress, finished: dict[str, PointRecord]
    ):
        self._point = point
        self._planner = planner
        self._files = files
        self._progress = progress
        self._finished = finished
        self._alone_s = math.nan
        self._warned_cache = False
        self._reported: set[str] = set()  # notes
        self.records: list[PointRecord] = []
        self.answer: Answer | None = None
        self.lost = ""  # why the server, or a generator, is considered gone
        self.unwritten = ""  # why results can no longer be written

    @property
    def answer_so_far(self) -> Answer | None:
        """The answer of a run that ends early; None if no load point is valid, so that nothing is known of any rate."""
        return self.answer if any(r.valid for r in self.records if r.phase != "probe") else None

    def owns(self, record: PointRecord) -> bool:
        return record.configuration == self._point.configuration and record.workload == self._point.workload.name

    def records_of(self, phase: Phase) -> list[PointRecord]:
        return [r for r in self.records if r.phase == phase]

    def probe(self) -> float:
        """Measure one request alone; returns its E2E latency in seconds. Checks the API and the output length."""
        name = point_id(self._point.configuration, self._point.workload.name, "probe", 0.0, 0)
        record = self._finished.get(name)
        self._report_notes()
        if record is None:
            record = self._new_probe()
            self._report_notes()  # some data sets are read when the first request is built
        self.records.append(record)
        self._alone_s = record.e2e_p50_ms / 1e3
        self._progress.message(
            f"one request alone: {self._alone_s:.3g} s (TTFT {record.ttft_p50_ms:.0f} ms, "
            f"ITL {record.itl_p50_ms:.1f} ms)"
        )
        return self._alone_s

    def _report_notes(self) -> None:
        for note in self._point.notes():
            if note not in self._reported:
                self._reported.add(note)
                self._progress.message(note)

    def _new_probe(self) -> PointRecord:
        self._progress.message(f"probe: sending one request of {self._point.workload.name} …")
        limit_s = min(_PROBE_LIMIT_S, max(self._planner.budget.left_s(), 1.0))
        record, requests, generators = self._point.probe(lambda _: None, limit_s)
        if record.valid and record.e2e_p50_ms < _SECOND_PROBE_BELOW_S * 1e3:
            # The first request included the server's warm-up.
            record, requests, generators = self._point.probe(lambda _: None, limit_s)
        try:
            self._check_probe(record, requests, limit_s)
        finally:
            self._files.add_point(record, requests, generators=generators)
        if not self._point.reader.available:
            self._progress.message(
                "the server has no /metrics with known metric names: rates are judged by backlog and completions, "
                "not by preemptions"
            )
        return record

    def _check_probe(self, record: PointRecord, requests: list[RequestRecord], limit_s: float) -> None:
        url = self._point.server.name
        if not requests or requests[0].status == "cut short":
            if self._planner.budget.stopped:
                raise InterruptedRunError(None)
            raise BenchError(
                f"a single request took more than {limit_s:.0f} s: raise --max-minutes, or lower --input or --output"
            )
        request = requests[0]
        if request.status != "ok":
            record.reason = f"failed with {request.status}" + (f": {request.error}" if request.error else "")
            error = LostServerError if request.status == "connection" else BenchError
            raise error(f"the first request to {url} {record.reason}")
        if request.error:
            self._progress.message(f"warning: the first request: {request.error}")
        if request.output_tokens != request.asked_output_tokens:
            record.reason = f"received {request.output_tokens} of {request.asked_output_tokens} requested tokens"
            if not self._point.server.fixes_lengths:
                self._progress.message(
                    f"{record.reason}: without ignore_eos, outputs end at the model's end-of-sequence token"
                )
                return
            self._progress.message(
                f"warning: {record.reason}: the server ignores ignore_eos or max_tokens; "
                "load points whose outputs do not have the requested length are invalid"
            )

    def report_search_plan(self, start_rate: float, latency_s: float) -> None:
        planner = self._planner
        low, high = (duration(seconds) for seconds in sorted(planner.expected_s(start_rate, latency_s)))
        ladder = ", then measure a ladder of six rates" if planner.ladder else ""
        of_time = self._point.server.of_time
        self._progress.message(
            f"plan: search from {start_rate:g} req/s with {planner.precision:.0%} precision, confirm{ladder}; about "
            f"{low if low == high else f'{low} to {high}'}, "
            f"at most {duration(planner.budget.limit_s)}{of_time} (--max-minutes)"
        )

    def report_fixed_plan(self, rates: Sequence[float], latency_s: float) -> None:
        expected = self._planner.fixed_s(list(rates), latency_s)
        shown = ", ".join(f"{r:g}" for r in rates)
        self._progress.message(
            f"plan: measure {shown} req/s; about {duration(expected)}, at most "
            f"{duration(self._planner.budget.limit_s)}{self._point.server.of_time} (--max-minutes)"
        )

    def measure(self, trial: Trial) -> PointRecord | None:
        """Measure one load point of the search; None if the time is up or the server is gone."""
        known = self._known(trial.phase, trial.rate, trial.repeat)
        if known is not None:
            return known
        latency_s = self._latency_s(trial.rate)
        timing = self._planner.search_timing(trial, latency_s)
        return self._measure(trial.rate, trial.phase, trial.repeat, timing, latency_s)

    def run_rates(self, phase: Phase, rates: Sequence[float], first_repeat: int = 0) -> None:
        """Measure the rates one after the other; those that do not fit into the time are reported and left out."""
        rounded = [round_rate(r) for r in rates]
        answer = self.answer.rate if self.answer is not None else None
        left_out: list[float] = []
        for i, rate in enumerate(rounded):
            repeat = first_repeat + rounded[:i].count(rate)
            if self._known(phase, rate, repeat) is not None:
                continue
            latency_s = self._latency_s(rate)
            if phase == "ladder":
                # Above the sustained rate latencies grow without bound, so no warm-up is long enough.
                latency_s = min(latency_s, _LADDER_LATENCIES * self._alone_s)
                found = answer or max(rounded) / 1.5
                timing = self._planner.ladder_timing(rate, found, latency_s, len(rounded) - i)
            else:
                timing = self._planner.fixed_timing(rate, latency_s, len(rounded) - i)
            if self._measure(rate, phase, repeat, timing, latency_s) is None:
                left_out.append(rate)
        if left_out and not (self._planner.budget.stopped or self.lost or self.unwritten):
            shown = ", ".join(f"{r:g}" for r in left_out)
            self._progress.message(f"no time left for {shown} req/s (--max-minutes)")

    def ladder(self, rates: Sequence[float] | None, round_number: int = 0) -> None:
        """Measure fixed rates after a search, below and above its answer."""
        if rates is None:
            if self.answer is None or self.answer.rate is None:
                return
            rates = ladder_rates(self.answer.rate)
        self.run_rates("ladder", rates, round_number)

    def _known(self, phase: Phase, rate: float, repeat: int) -> PointRecord | None:
        name = point_id(self._point.configuration, self._point.workload.name, phase, rate, repeat)
        record = self._finished.get(name)
        if record is not None:
            self.records.append(record)
        return record

    def _latency_s(self, rate: float) -> float:
        """The expected E2E latency: extrapolated from the nearest lower rate that did not fail."""
        below = [r for r in self.records if (r.sustained or r.undecided) and r.rate <= rate and r.e2e_p50_ms > 0]
        above = [r.e2e_p50_ms / 1e3 for r in self.records if r.sustained and r.rate >= rate and r.e2e_p50_ms > 0]
        nearest = max(below, key=lambda r: r.rate, default=None)
        known = self._alone_s
        if nearest is not None:
            known = nearest.e2e_p50_ms / 1e3 * min(2.0, rate / nearest.rate) ** 0.3
        return max(self._alone_s, min([known, *above]))

    def _measure(
        self, rate: float, phase: Phase, repeat: int, timing: Timing | None, latency_s: float
    ) -> PointRecord | None:
        if timing is None or self.lost or self.unwritten or self._planner.budget.left_s() <= 0:
            return None
        plan = PointPlan(rate, phase, repeat, timing, latency_s, cut_overload=phase in ("search", "confirm"))
        self._progress.point_started(plan)
        try:
            record, requests, generators = self._point.run(plan, lambda state: self._progress.point_tick(plan, state))
        except LostGeneratorError as error:
            self.lost = str(error)
            self._progress.point_dropped()
            return None
        self.records.append(record)
        try:  # saved before it is printed: stdout may be a closed pipe
            self._files.add_point(record, requests, self._point.reader.readings(), generators)
        except CannotWriteError as error:
            self.unwritten = str(error)  # this load point counts and is the last one
        self._progress.point_finished(record)
        self._check_server(record, requests)
        self._check_energy()
        return record

    def _check_energy(self) -> None:
        problem = self._point.energy.problem
        if problem and problem not in self._reported:
            self._reported.add(problem)
            self._progress.message(f"warning: a reading of the energy failed: {problem}")

    def _check_server(self, record: PointRecord, requests: list[RequestRecord]) -> None:
        """Check whether the server is gone, and whether it had the random prompts in its prefix cache."""
        failed = [r for r in requests if r.status == "connection"]
        if failed and not self._point.reader.healthy():
            self.lost = f"the server stopped answering at {record.rate:g} req/s: {failed[0].error or failed[0].status}"
        hits = record.prefix_hit_rate or 0.0
        if hits > 0.05 and not self._warned_cache and self._point.workload.describe().get("kind") == "random":
            self._warned_cache = True
            self._progress.message(
                f"warning: {hits:.0%} of the random prompts' tokens were found in the server's prefix cache, so it has "
                "seen these prompts before: choose another --seed or restart the server"
            )


def _reusable(record: PointRecord) -> bool:
    return record.valid or record.binding == "client"
