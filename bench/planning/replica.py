"""Finds what one replica sustains within the limits, and how it answers at its share of the load."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.measurement.load_point import PointPlan, PointState
from bench.measurement.run import BenchOptions, Subject, measure_configuration
from bench.planning.options import Candidate, PlanRequest
from bench.planning.rows import DOES_NOT_FIT, FAILED, NOT_SUPPORTED, Row, limited_by
from bench.results import Answer, GeneratorRecord, PointRecord, RequestRecord, RunFiles, ServerState
from bench.search.windows import MAX_VIRTUAL_MINUTES, WINDOW_LATENCIES
from bench.simulation import SimulatedServer
from bench.workloads import Workload, make_workload
from engine.errors import ConfigError, OutOfMemoryError
from engine.hardware.accuracy import description_version
from engine.hardware.description import read_hardware
from engine.simulation import Simulate, SimulatedEngine, without_core_log

TOO_SLOW = "too slow at any rate"
_SHARE_REQUESTS = 1000  # least number of requests behind the latencies of a row, so that a P99 rests on ten
_MORE_REPLICAS = 3  # tried in addition where the load of each one turns out to be too high

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Examined:
    """What came of a candidate: its row, its load points, and what the result files say about it."""

    row: Row
    points: list[PointRecord]
    answer: Answer | None = None
    described: dict[str, Any] | None = None  # None: it was not simulated


def examine(report: Report, candidate: Candidate, request: PlanRequest, simulate: Simulate) -> Examined:
    """Simulate a candidate; `report` receives a few words about what it does.

    Raises ModelError if the model can't be read, InterruptedRunError on Ctrl-C.
    """
    name = candidate.hardware
    row = Row(name, read_hardware(name).title, candidate.tp, description_version(name), FAILED)
    try:
        engine = simulate(request.model, candidate.flags(request))
    except (ConfigError, OutOfMemoryError) as error:
        cause = DOES_NOT_FIT if isinstance(error, OutOfMemoryError) else NOT_SUPPORTED
        return Examined(replace(row, limited_by=cause, note=" ".join(str(error).split())), [])
    try:
        with without_core_log():
            return _Replica(candidate, request, engine, report).examine(row)
    except BenchError as error:
        return Examined(replace(row, note=" ".join(str(error).split())), [])


class _Replica:
    def __init__(self, candidate: Candidate, request: PlanRequest, engine: SimulatedEngine, report: Report):
        self._request, self._engine, self._name = request, engine, candidate.name
        self._files = _KeptPoints()
        self._progress = _Progress(report)
        self._workload: Workload = make_workload(request.workload, engine.vocab_size)
        self._server = SimulatedServer(engine.simulation, engine.title)

    def examine(self, row: Row) -> Examined:
        answer = measure_configuration(self._subject())
        described = {
            "model": self._engine.model, "server": "redline", "serve": list(self._request.flags),
            "simulated": self._engine.mark, "resolved": {self._workload.name: self._engine.resolved},
        }  # fmt: skip
        if answer is None:
            return Examined(replace(row, note=self._last_reason()), self._files.points, None, described)
        failures = [p for p in self._files.points if p.rate == answer.high and p.sustained is False]
        failed = max(failures, key=lambda point: point.requests, default=None)  # the run that `binding` is from
        row = replace(row, limited_by=limited_by(failed, self._request.limits, answer.binding), note=answer.note)
        if answer.rate is None:
            row = replace(row, note=f"{TOO_SLOW}: {self._last_reason()}")
            return Examined(row, self._files.points, answer, described)
        row = self._share(replace(row, rate_per_replica=answer.rate), answer.rate)
        return Examined(row, self._files.points, answer, described)

    def _share(self, row: Row, sustained: float) -> Row:
        """The row with the replicas that serve the whole rate, and the latencies of each at its share."""
        replicas = math.ceil(self._request.rate / sustained - 1e-9)
        for more in range(_MORE_REPLICAS + 1):
            point = self._at(self._request.rate / (replicas + more), more)
            if point.sustained is not False:  # an undecided one is below a rate that was confirmed
                return self._served(row, point, replicas + more)
        return replace(row, limited_by=FAILED, note=f"not sustained at its share of the load: {point.reason}")

    def _served(self, row: Row, point: PointRecord, replicas: int) -> Row:
        each = self._request.rate / point.achieved_rate
        return replace(
            row,
            replicas=replicas,
            gpus=replicas * row.tp,
            load_per_replica=self._request.rate / replicas,
            output_tok_s=point.output_tok_s * each,
            total_tok_s=(point.output_tok_s + point.input_tok_s) * each,
            ttft_p50_ms=point.ttft_p50_ms,
            ttft_p99_ms=point.ttft_p99_ms,
            itl_p50_ms=point.itl_p50_ms,
            itl_p99_ms=point.itl_p99_ms,
            tpot_p50_ms=point.tpot_p50_ms,
            e2e_p99_ms=point.e2e_p99_ms,
            kv_use_max=point.kv_use_max,
        )

    def _at(self, rate: float, number: int) -> PointRecord:
        before = len(self._files.points)
        slowest_s = max(point.e2e_p99_ms for point in self._files.points if point.sustained) / 1e3
        window_s = max(_SHARE_REQUESTS / rate, WINDOW_LATENCIES * slowest_s)
        measure_configuration(self._subject(rates=(rate,), round=number, window_s=window_s))
        found = [point for point in self._files.points[before:] if point.phase == "fixed"]
        if not found:
            raise BenchError(f"the load point at {rate:.3g} req/s could not be simulated")
        return found[-1]

    def _subject(self, **rates: Any) -> Subject:
        request = self._request
        options = BenchOptions(
            seed=request.seed, precision=request.precision, max_minutes=MAX_VIRTUAL_MINUTES, limits=request.limits,
            arrivals=request.arrivals, ladder=False, **rates,
        )  # fmt: skip
        return Subject(self._server, self._workload, self._name, options, self._files, self._progress)

    def _last_reason(self) -> str:
        return next((p.reason for p in reversed(self._files.points) if not p.sustained), "nothing was simulated")


class _KeptPoints(RunFiles):
    """Load points in memory: the requests of a plan are too many for files, and the same seed makes them again."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.points: list[PointRecord] = []

    def add_point(
        self,
        point: PointRecord,
        requests: list[RequestRecord],  # noqa: ARG002
        readings: Sequence[ServerState] = (),  # noqa: ARG002
        generators: Sequence[GeneratorRecord] = (),  # noqa: ARG002
    ) -> None:
        self.points.append(point)


class _Progress:
    """Implements `bench.measurement.progress.Progress`: only the rate in progress is reported."""

    def __init__(self, report: Report):
        self._report = report

    def message(self, text: str) -> None:
        """Plans and warnings about single runs are too much for a table of many."""

    def point_started(self, plan: PointPlan) -> None:
        self._report(f"{plan.rate:.3g} req/s")

    def point_tick(self, plan: PointPlan, state: PointState) -> None:
        """A load point takes seconds."""

    def point_finished(self, record: PointRecord) -> None:
        """The next one is reported when it starts."""

    def point_dropped(self) -> None:
        """Simulations have no generators that could be lost."""

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        """There is one run."""
