"""The recording of a load point: raw bytes with timestamps, parsed into request records after the load."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bench.loadgen.response import Body, Head
from bench.loadgen.sse import StreamedResponse, describe_non_stream, error_message, read_stream
from bench.loadgen.stream import GENERATOR, Stream
from bench.results import RequestRecord
from bench.workloads.base import RequestSpec

# Beyond these limits the measurement would describe the generator, not the server.
CPU_SHARE_LIMIT = 0.9
DELAY_LIMIT_S = 0.05  # of sends and reads, P99
DELAY_SHARE, DELAY_FLOOR_S = 0.1, 0.01  # of sends: this share of the median TTFT, but not less than the floor
# A generator that waited for its core for more than half of its running time shares it with a busy process. Kernel
# timestamps keep most latencies right, but reads get a lower limit. The floor is above 4 ms, the time slice that a fair
# scheduler gives the other process: a server that computes on the generator's core does not invalidate a load point.
STARVED_SHARE, STARVED_FLOOR_S = 0.06, 0.005
_UNENDED = "the response was not terminated as HTTP requires, so the generator waited until no more bytes arrived"
ENOUGH_READS = 1000  # for a meaningful P99 of the read delay


@dataclass(frozen=True, slots=True)
class GeneratorUse:
    """CPU use of the loops; shares of one core, 0..1, the highest of all processes."""

    cpu_s: float  # of all processes
    cpu_share: float
    starved_share: float  # of the time: ready to run while another process had the core; 0 if unknown
    processes: int = 1


def merged_use(uses: Sequence[GeneratorUse]) -> GeneratorUse:
    """The use of several loads that ran together."""
    return GeneratorUse(
        cpu_s=sum(use.cpu_s for use in uses),
        cpu_share=max((use.cpu_share for use in uses), default=0.0),
        starved_share=max((use.starved_share for use in uses), default=0.0),
        processes=sum(use.processes for use in uses),
    )


@dataclass(frozen=True, slots=True)
class Load:
    """What the loops of one load recorded; streams in the order of the requests."""

    streams: list[Stream]
    start_ns: int  # time 0, on the real-time clock
    use: GeneratorUse
    cut_short: bool  # requests were open when it ended


@dataclass(frozen=True, slots=True)
class HostClock:
    """The clock of a generator on another host beside the clock here, compared before and after a load; seconds."""

    generator: str  # HOST:PORT
    offset_s: float  # its time minus the time here, before the load
    drift_s: float  # what the offset changed by until after the load; NaN: the generator was lost
    error_s: float  # what is left of the difference at most, after the offset is subtracted; NaN as drift_s


@dataclass(frozen=True, slots=True)
class HostPart:
    """The part of a load that a generator on another host has sent."""

    clock: HostClock
    indices: Sequence[int]  # of its requests
    use: GeneratorUse | None  # None: it was lost


@dataclass(frozen=True, slots=True)
class HostHealth:
    """What one generator on another host did; times in seconds, of the requests and reads that it recorded."""

    clock: HostClock
    requests: int
    sent: int  # or tried
    lateness_p99_s: float  # 0 if nothing was recorded, as `loop_lag_p99_s`
    loop_lag_p99_s: float
    chunks: int
    use: GeneratorUse | None


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """Whether the generator kept up; times in seconds."""

    lateness_p99_s: float  # sent - intended, over all requests sent
    loop_lag_p99_s: float  # from the arrival of bytes to their read; 0 if the system gives no receive timestamps
    cpu_share: float  # of one core, 0..1
    coalesced_reads: int  # reads with several chunks that carry tokens; these share the timestamp of the last
    saturated: bool  # the generator was the bottleneck: the load point is invalid
    reason: str  # "it used …"; "" if not saturated
    cpu_s: float = 0.0  # of all generator processes, while the load ran
    starved_share: float = 0.0  # of the time, ready to run while another process had the core
    processes: int = 1
    chunks: int = 0  # read
    fault: str = ""  # why the load was not the one that was requested, whatever the generator did: it is invalid
    hosts: tuple[HostHealth, ...] = ()  # generators on other hosts

    @property
    def clocks(self) -> list[HostClock]:
        """Of the generators on other hosts."""
        return [host.clock for host in self.hosts]

    @property
    def cpu_us_per_chunk(self) -> float:
        return self.cpu_s * 1e6 / self.chunks if self.chunks else 0.0


@dataclass(slots=True)
class _Reading:
    """One stream, parsed."""

    status: str
    error: str
    response: StreamedResponse
    arrivals_ns: np.ndarray  # int64, one per chunk with tokens
    reads: np.ndarray  # int64, index of the read that completed each chunk


class Recording:
    """The recording of one load point, requests in the order of their intended times."""

    def __init__(
        self,
        streams: list[Stream],
        specs: list[RequestSpec],
        start_ns: int,
        use: GeneratorUse,
        *,
        cut_short: bool,
        fault: str = "",
        parts: Sequence[HostPart] = (),
    ):
        self._streams = [s for s in streams if s.begun]
        self._specs = specs
        self._start_ns = start_ns
        self._use = use
        self.cut_short = cut_short
        self._fault = fault
        self._parts = parts
        self._owners = {index: part.clock.generator for part in parts for index in part.indices}
        self.requested = len(streams)
        self.sent = sum(s.sent_ns > 0 for s in streams)

    def records(self, window: tuple[float, float]) -> list[RequestRecord]:
        """One record per request that was sent or tried; `window` in seconds, by intended times, without its end."""
        return [self._record(s, r, window) for s, r in zip(self._streams, self._readings, strict=True)]

    @cached_property
    def health(self) -> GeneratorHealth:
        sent = [s for s in self._streams if s.sent_ns]
        # A server that is slow to accept also delays requests; the generator's delay begins with the connection.
        slip = _p99([s.sent_ns - max(s.freed_ns or s.intended_ns, s.ready_ns) for s in sent])
        lag = _lag_p99(self._streams)
        coalesced = sum(_coalesced(r.reads) for r in self._readings)
        causes = self._faults(slip, lag)
        return GeneratorHealth(
            lateness_p99_s=_lateness_p99(sent),
            loop_lag_p99_s=lag,
            cpu_share=self._use.cpu_share,
            coalesced_reads=coalesced,
            saturated=bool(causes),
            reason="it " + " and ".join(causes) if causes else "",
            cpu_s=self._use.cpu_s,
            starved_share=self._use.starved_share,
            processes=self._use.processes,
            chunks=sum(len(r.reads) for r in self._readings),
            fault=self._fault,
            hosts=tuple(self._host(part) for part in self._parts),
        )

    def _host(self, part: HostPart) -> HostHealth:
        mine = set(part.indices)
        pairs = [(s, r) for s, r in zip(self._streams, self._readings, strict=True) if s.index in mine]
        streams = [stream for stream, _ in pairs]
        return HostHealth(
            clock=part.clock,
            requests=len(part.indices),
            sent=len(streams),
            lateness_p99_s=_lateness_p99([s for s in streams if s.sent_ns]),
            loop_lag_p99_s=_lag_p99(streams),
            chunks=sum(len(reading.reads) for _, reading in pairs),
            use=part.use,
        )

    def _faults(self, slip_s: float, lag_s: float) -> list[str]:
        """Why the recording cannot be trusted."""
        use = self._use
        causes = []
        if use.cpu_share > CPU_SHARE_LIMIT:
            causes.append(f"used {use.cpu_share:.0%} of its core")
        typical_s = self._typical_ttft_s()
        closed_loop = any(s.freed_ns for s in self._streams)
        # In a closed loop a late send lowers the concurrency a little, but no latency counts from it.
        limit_s = DELAY_LIMIT_S if closed_loop else _within(DELAY_FLOOR_S, DELAY_SHARE * typical_s)
        lacks = [s.failure[1] for s in self._streams if s.failure is not None and s.failure[0] == GENERATOR]
        if lacks:
            causes.append(f"could not open {len(lacks)} connections ({lacks[0]})")
        if slip_s > limit_s:
            causes.append(f"sent requests {slip_s * 1e3:.0f} ms late (P99)")
        limit_s = DELAY_LIMIT_S
        if use.starved_share > use.cpu_share / 2 and sum(len(s.read_ns) for s in self._streams) >= ENOUGH_READS:
            limit_s = _within(STARVED_FLOOR_S, STARVED_SHARE * typical_s)
        if lag_s > limit_s:
            causes.append(f"read responses {lag_s * 1e3:.1f} ms after they arrived (P99)")
        if causes and use.starved_share > use.cpu_share / 2:
            causes.append(f"waited {use.starved_share:.0%} of the time for a core used by other processes")
        return causes

    def _typical_ttft_s(self) -> float:
        pairs = zip(self._streams, self._readings, strict=True)
        firsts = [int(r.arrivals_ns[0]) - s.intended_ns for s, r in pairs if len(r.arrivals_ns)]
        return float(np.median(firsts)) / 1e9 if firsts else 0.0

    @cached_property
    def _readings(self) -> list[_Reading]:
        return [_read(s, self._specs[s.index].output_tokens) for s in self._streams]

    def _record(self, stream: Stream, reading: _Reading, window: tuple[float, float]) -> RequestRecord:
        spec = self._specs[stream.index]
        response, arrivals = reading.response, reading.arrivals_ns
        intended_s = (stream.intended_ns - self._start_ns) / 1e9
        ok = reading.status == "ok"
        counted = response.completion_tokens
        return RequestRecord(
            index=stream.index,
            intended_s=intended_s,
            sent_s=((stream.sent_ns or stream.intended_ns) - self._start_ns) / 1e9,
            ttft_s=(int(arrivals[0]) - stream.intended_ns) / 1e9 if len(arrivals) else None,
            e2e_s=(int(arrivals[-1]) - stream.intended_ns) / 1e9 if ok and len(arrivals) else None,
            input_tokens=spec.input_tokens if response.prompt_tokens is None else response.prompt_tokens,
            asked_output_tokens=spec.output_tokens,
            output_tokens=sum(response.tokens) if counted is None else counted,
            cached_tokens=response.cached_tokens,
            in_window=window[0] <= intended_s < window[1],
            status=reading.status,
            error=reading.error,
            chunk_gaps_s=(np.diff(arrivals) / 1e9).tolist(),
            chunk_tokens=list(response.tokens),
            generator=self._owners.get(stream.index, ""),
        )


def _read(stream: Stream, requested: int) -> _Reading:
    """Parse one stream; `requested` is the requested output length."""
    response, places = StreamedResponse(), np.empty(0, dtype=np.int64)
    failure = stream.failure
    if stream.head is None:
        failure = failure or ("connection", "the server closed the connection before it answered")
    else:
        body = Body(bytes(stream.response), stream.head, stream.ends)
        if stream.head.status != 200:
            failure = (f"http {stream.head.status}", _refusal(stream.head, body))
        else:
            response = read_stream(body.data, requested)
            places = np.array([body.place(p) for p in response.places], dtype=np.int64)
            failure = _judge(response, body, failure, stream.head.media)
    status, error = failure or ("ok", _UNENDED if stream.unended else "")
    reads = np.searchsorted(np.array(stream.ends, dtype=np.int64), places, side="right")
    arrivals = np.array(stream.stamps, dtype=np.int64)[reads] if len(reads) else np.empty(0, dtype=np.int64)
    return _Reading(status, error, response, arrivals, reads)


def _refusal(head: Head, body: Body) -> str:
    """The message of a response with a status other than 200."""
    if 300 <= head.status < 400 and head.location:
        return f"the server redirects to {head.location}"
    return error_message(body.data) or body.malformed


def _judge(
    response: StreamedResponse, body: Body, failure: tuple[str, str] | None, media: str
) -> tuple[str, str] | None:
    """What is wrong with a response of 200, if anything; the server's message first, since it often closes after it."""
    if response.error:
        return "stream error", response.error
    if response.malformed or body.malformed:
        return "malformed stream", response.malformed or body.malformed
    if failure is not None:
        return failure
    if not response.events:
        return "no stream", describe_non_stream(body.data, media)
    if not response.ended:
        return "malformed stream", "the stream ends without [DONE] or a finish reason"
    if not response.tokens:
        return "malformed stream", "the stream contains no tokens"
    return None


def _lateness_p99(sent: Sequence[Stream]) -> float:
    return _p99([s.sent_ns - (s.freed_ns or s.intended_ns) for s in sent])


def _lag_p99(streams: Sequence[Stream]) -> float:
    lags = [np.array(s.read_ns, dtype=np.int64) - np.array(s.stamps, dtype=np.int64) for s in streams]
    return _p99(np.concatenate(lags) if lags else [])


def _coalesced(reads: np.ndarray) -> int:
    """The number of reads that completed more than one chunk with tokens."""
    return int((np.unique(reads, return_counts=True)[1] > 1).sum()) if len(reads) else 0


def _p99(nanoseconds: list[int] | np.ndarray) -> float:
    return float(np.percentile(nanoseconds, 99)) / 1e9 if len(nanoseconds) else 0.0


def _within(floor_s: float, limit_s: float) -> float:
    return min(DELAY_LIMIT_S, max(floor_s, limit_s))
