"""Closed loop: keeps a fixed number of requests open instead of sending at a rate; there is no verdict."""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bench.errors import BenchError
from bench.measurement.generator_columns import generator_records
from bench.measurement.load_point import (
    INTERRUPTED,
    LoadPoint,
    Measured,
    PointPlan,
    PointRecords,
    PointState,
    Watch,
    drain,
    point_id,
)
from bench.measurement.machine import record_shares
from bench.measurement.progress import Progress
from bench.measurement.run import InterruptedRunError, LostServerError, stop_on_interrupt
from bench.results import PointRecord, RequestRecord, RunFiles
from bench.results.writing import CannotWriteError
from bench.search.bracket import round_rate
from bench.search.windows import TimeBudget, Timing
from bench.target.metrics import window_state
from bench.workloads.arrivals import point_seed

_EVER = (-1.0, float("inf"))
_SEED_REPEAT = 3000  # differs from those of all open-loop points


@dataclass(frozen=True, slots=True)
class ClosedPoint(LoadPoint):
    """A load point with a fixed concurrency."""

    def run_closed(self, plan: PointPlan, chunks_per_s: float, show: Callable[[PointState], None]) -> PointRecords:
        """Send the plan's requests. Every request counts, including the ramp at the beginning and at the end.

        Args:
            plan: with `concurrency` and `requests` set.
            chunks_per_s: upper estimate of the chunks to receive; decides the number of generator processes.
            show: called with the progress.
        """
        concurrency, count = plan.concurrency, plan.requests
        assert concurrency is not None
        assert count is not None
        seed = point_seed(self.seed, self.workload.name, float(concurrency), _SEED_REPEAT)
        specs = self.workload.requests(count, seed)
        started = self.server.date()
        self.reader.clear()
        self.energy.clear()
        watch = Watch(plan, self.reader, show, self.left_s, self.stopped, self.server.now)
        before = self.read_machine()
        recording = self.server.run_closed_loop(
            specs, concurrency, observer=watch, time_limit_s=max(1.0, self.left_s()), chunks_per_s=chunks_per_s
        )
        after = self.read_machine()
        self.reader.read()
        self.reader.started_at = watch.started_at
        requests = recording.records(_EVER)
        window = _window(requests, watch.now_s)
        server = window_state(self.reader.states, watch.started_at + window[0], watch.started_at + window[1])
        done = sum(r.status == "ok" for r in requests)
        rate = done / max(window[1] - window[0], 1e-9)
        record = self._record(plan, Measured(requests, window, server, recording.health, watch.now_s))
        record.point_id = point_id(self.configuration, self.workload.name, "closed", concurrency, 0)
        record.completed, record.achieved_rate, record.rate = done, rate, round_rate(rate)
        record.seed, record.started, record.concurrency = seed, started, concurrency
        health = recording.health
        record.reason = health.fault or _fault(
            requests, count, health.reason, watch.cut, fixed=self.server.fixes_lengths
        )
        record.valid = not record.reason
        record.binding = "client" if health.saturated and not health.fault else ""
        record.provisional = False
        if record.valid:
            record.reason = f"concurrency {concurrency}"
        record_shares(record, before, after)
        self.record_energy(record, watch.started_at)
        drain(self.reader, self.drain_limit_s, self.server)
        return PointRecords(record, requests, generator_records(record.point_id, health))


def measure_closed_loop(
    point: ClosedPoint, files: RunFiles, progress: Progress, concurrency: int, count: int, budget: TimeBudget
) -> tuple[PointRecord, list[RequestRecord]]:
    """Measure one request alone, then the closed loop, and save both; if saving fails, `files.unwritten` is set.

    Returns the loop's records. After Ctrl-C (`budget.stopped`) these are the requests completed until then. Raises
    InterruptedRunError for a Ctrl-C before the loop, BenchError if the first request fails, LostServerError if no
    request of the loop was answered.
    """
    budget.start()
    with stop_on_interrupt(budget), point.reader, point.energy:
        probe = point.probe(lambda _: None, max(1.0, budget.left_s()))
        alone, records = probe.point, probe.requests
        if not records or records[0].status != "ok":
            if budget.stopped:
                raise InterruptedRunError(None)
            cause = f"{records[0].status} {records[0].error}".strip() if records else "no answer"
            raise BenchError(f"the first request to {point.server.name} failed with {cause}")
        _save(files, probe)
        for note in point.notes():
            progress.message(note)
        if records[0].error:
            progress.message(f"warning: the first request: {records[0].error}")
        what = f"{count} request{'s' if count > 1 else ''}"
        progress.message(
            f"one request alone: {alone.e2e_p50_ms / 1e3:.3g} s; sending {what}, concurrency {concurrency}"
        )
        plan = PointPlan(
            1.0, "closed", 0, Timing(0.0, 1e9, 0.0), 0.0, cut_overload=False, concurrency=concurrency, requests=count
        )
        progress.point_started(plan)
        chunks_per_s = concurrency * _chunks_per_s(records[0])
        loop = point.run_closed(plan, chunks_per_s, lambda state: progress.point_tick(plan, state))
        record, requests = loop.point, loop.requests
        _save(files, loop)
        progress.point_finished(record)
        if point.energy.problem:
            progress.message(f"warning: a reading of the energy failed: {point.energy.problem}")
    if record.requests and not record.completed and not budget.stopped:
        raise LostServerError(f"none of {record.requests} requests was answered: {record.failures or 'cut short'}")
    return record, requests


def _save(files: RunFiles, records: PointRecords) -> None:
    with contextlib.suppress(CannotWriteError):  # kept in memory by `files`, which sets `unwritten`
        files.add_point(records.point, records.requests, generators=records.generators)


def _chunks_per_s(record: RequestRecord) -> float:
    """Chunks per second of one stream on an otherwise idle server."""
    return len(record.chunk_gaps_s) / max(record.decode_s, 1e-6) if len(record.chunk_gaps_s) else 0.0


def _window(requests: list[RequestRecord], ended_s: float) -> tuple[float, float]:
    """From the intended time of the first request to the end of the last response."""
    start = min((r.intended_s for r in requests), default=0.0)
    ends = [r.intended_s + r.e2e_s for r in requests if r.e2e_s is not None]
    open_ones = any(r.status == "cut short" for r in requests)
    return start, ended_s if open_ones or not ends else max(ends)


def _fault(requests: list[RequestRecord], count: int, client: str, cut: str, *, fixed: bool = True) -> str:
    """Why the load point is invalid, else "". Failed requests do not make it invalid if others succeeded."""
    if client:
        return f"the load generator was the bottleneck: {client}"
    if cut == INTERRUPTED:
        done = sum(r.status == "ok" for r in requests)
        return f"the load point was interrupted after {done} of {count} requests were answered"
    if cut:
        cause = f": {cut}" if cut != "time" else " (--max-minutes)"
        return f"the load point ended before all requests were answered{cause}"
    if len(requests) < count:
        return f"only {len(requests)} of {count} requests were sent"
    states = Counter(r.status for r in requests)
    if not states["ok"]:
        return "no request was answered"
    missed = sum(r.output_tokens != r.asked_output_tokens for r in requests if r.status == "ok") if fixed else 0
    return f"{missed} of {states['ok']} outputs did not have the requested length" if missed else ""
