"""Offline throughput: all requests are given to an engine in this process at once, without a server."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from bench.errors import BenchError
from bench.measurement.server import ServerUnderTest
from bench.results import PointRecord, RequestRecord, slug, utc_now
from bench.search.bracket import round_rate
from bench.statistics.intervals import percentile, percentile_interval
from bench.statistics.latencies import Latencies, latencies
from bench.workloads import Workload
from bench.workloads.arrivals import point_seed
from bench.workloads.base import RequestSpec

_SEED_REPEAT = 4000  # differs from those of all load points over HTTP
_WARMUP_REQUESTS = 1


@dataclass(frozen=True, slots=True)
class Finished:
    """One finished request; times in seconds since all were submitted."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    first_token_s: float
    end_s: float


class OfflineEngine(Protocol):
    """An engine that runs requests without a server."""

    def run(self, specs: Sequence[RequestSpec], done: Callable[[], None]) -> list[Finished]:
        """Run requests that are submitted at once, in this order. Raises BenchError if one can't be run.

        `done` is called after each of them, from any thread.
        """
        ...

    def now(self) -> float:
        """Seconds on the clock of the measurement."""
        ...

    def date(self) -> str:
        """Date and time, ISO 8601."""
        ...


@dataclass(frozen=True, slots=True)
class OfflinePoint:
    """One measurement: `count` requests of a workload on one configuration."""

    engine: OfflineEngine
    workload: Workload
    configuration: str
    count: int
    seed: int
    repeat: int = 0  # number of the round; each round has other requests

    @property
    def point_id(self) -> str:
        again = f"-{self.repeat}" if self.repeat else ""
        return f"{slug(self.configuration)}_{slug(self.workload.name)}_offline-{self.count}{again}"

    def run(self, done: Callable[[], None]) -> tuple[PointRecord, list[RequestRecord]]:
        """Run all requests; their number per second is the rate of the record. The first steps are warmed up before."""
        seed = point_seed(self.seed, self.workload.name, float(self.count), _SEED_REPEAT + self.repeat)
        self.engine.run(self.workload.requests(_WARMUP_REQUESTS, seed + 1), lambda: None)
        specs = self.workload.requests(self.count, seed)
        started = self.engine.date()
        began = self.engine.now()
        finished = self.engine.run(specs, done)
        seconds = self.engine.now() - began
        record = self._record(finished, specs, seconds)
        record.seed, record.started = seed, started
        return record, _requests(finished, specs)

    def _record(self, finished: list[Finished], specs: Sequence[RequestSpec], seconds: float) -> PointRecord:
        requests = _requests(finished, specs)
        samples = latencies(requests, seconds)
        prompts, outputs, cached = (
            sum(getattr(one, name) for one in finished) for name in ("prompt_tokens", "output_tokens", "cached_tokens")
        )
        missed = sum(one.output_tokens != spec.output_tokens for one, spec in zip(finished, specs, strict=True))
        rate = len(finished) / seconds
        return PointRecord(
            point_id=self.point_id, configuration=self.configuration, workload=self.workload.name, phase="offline",
            rate=round_rate(rate), sustained=None,
            reason=f"{missed} outputs did not have the requested length" if missed else "all at once",
            valid=not missed, provisional=False, preemptions=None, requests=len(finished), completed=len(finished),
            failed=0, window_s=seconds, achieved_rate=rate,
            input_tok_s=prompts / seconds, output_tok_s=outputs / seconds,
            prefix_hit_rate=cached / prompts if prompts else None, kv_use_max=None, waiting_max=None, running_max=None,
            lateness_p99_ms=0.0, seed=0, started="", repeat=self.repeat, concurrency=self.count,
            **_percentiles(samples),
        )  # fmt: skip


def _percentiles(samples: Latencies) -> dict[str, Any]:
    """The latency columns of a record in ms; those of gaps between tokens are unknown."""
    columns = {f"{name}_p{share}_ms": float("nan") for name in ("itl", "tpot") for share in (50, 99)}
    for name in ("ttft", "e2e"):
        columns |= {f"{name}_p{share}_ms": percentile(getattr(samples, name), share) for share in (50, 99)}
    columns["ttft_p99_low_ms"], columns["ttft_p99_high_ms"] = percentile_interval(samples.ttft, 99, None)
    return columns | {"itl_p99_low_ms": float("nan"), "itl_p99_high_ms": float("nan")}


def _requests(finished: list[Finished], specs: Sequence[RequestSpec]) -> list[RequestRecord]:
    return [
        RequestRecord(
            index=i, intended_s=0.0, sent_s=0.0, ttft_s=one.first_token_s, e2e_s=one.end_s,
            input_tokens=one.prompt_tokens, asked_output_tokens=spec.output_tokens, output_tokens=one.output_tokens,
            cached_tokens=one.cached_tokens, in_window=True, status="ok",
        )
        for i, (one, spec) in enumerate(zip(finished, specs, strict=True))
    ]  # fmt: skip


class LLMEngine:
    """Redline's own engine, through its Python API; a context manager that ends it.

    Args:
        model: as of `redline serve`.
        options: fields of EngineConfig.
    """

    def __init__(self, model: str, **options: object):
        from engine.llm import LLM

        self._llm = LLM(model, **options)

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._llm.close()

    def now(self) -> float:
        return time.perf_counter()

    def date(self) -> str:
        return utc_now()

    @property
    def vocab_size(self) -> int:
        return self._llm.vocab_size

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts, without special tokens."""
        return [self._llm.tokenizer.encode(text, False) for text in texts]

    def run(self, specs: Sequence[RequestSpec], done: Callable[[], None]) -> list[Finished]:
        from engine.llm import SamplingParams

        params = [SamplingParams(temperature=0.0, max_tokens=s.output_tokens, ignore_eos=True) for s in specs]
        if all(spec.messages is not None for spec in specs):
            outputs = self._llm.chat([spec.messages or [] for spec in specs], params, progress=done)
        elif any(spec.messages is not None for spec in specs):
            raise BenchError("the workload mixes chats and prompts, which --offline can't send together (--dataset)")
        else:
            prompts = [
                list(spec.prompt_ids) if spec.prompt_ids is not None else spec.prompt_text or "" for spec in specs
            ]
            outputs = self._llm.generate(prompts, params, progress=done)
        return [
            Finished(
                len(one.prompt_token_ids), len(one.outputs[0].token_ids), one.num_cached_tokens,
                one.metrics.first_token_s, one.metrics.end_s,
            )
            for one in outputs
        ]  # fmt: skip


class ServedOffline:
    """A server that is given all requests at once; implements `OfflineEngine`."""

    def __init__(self, server: ServerUnderTest):
        self._server = server
        self.now, self.date = server.now, server.date

    def run(self, specs: Sequence[RequestSpec], done: Callable[[], None]) -> list[Finished]:
        recording = self._server.run_closed_loop(
            list(specs), len(specs), observer=_Observer(done), time_limit_s=math.inf, chunks_per_s=1.0
        )
        requests = recording.records((0.0, math.inf))
        failed = next((one for one in requests if one.status != "ok"), None)
        if failed is not None:
            raise BenchError(f"a request failed: {failed.error or failed.status}")
        return [
            Finished(one.input_tokens, one.output_tokens, one.cached_tokens, one.ttft_s or 0.0, one.e2e_s or 0.0)
            for one in requests
        ]


class _Observer:
    """Implements `bench.loadgen.Observer`: waits for all requests."""

    def __init__(self, done: Callable[[], None]):
        self._done, self._seen = done, 0

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:  # noqa: ARG002
        for _ in range(finished - self._seen):
            self._done()
        self._seen = finished
        return True


def with_repeats(spec: dict[str, object], repeats: Sequence[int]) -> list[dict[str, object]]:
    """The workload once for each percentage of repeated requests."""
    return [spec | {"repeat": repeat} for repeat in repeats] if repeats else [dict(spec)]


def known_points(records: Sequence[PointRecord], point: OfflinePoint) -> PointRecord | None:
    """The valid record of an earlier run of the same point, so that an interrupted run can be continued."""
    return next((r for r in records if r.valid and r.point_id == point.point_id), None)
