"""The loop of one load point: one thread, one epoll set, one connection a stream, no parsing of what arrives."""

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bench.loadgen.alarm import READ, WRITE, Poller
from bench.loadgen.connection import BLOCKED, ReceiveBuffer, connect
from bench.loadgen.recording import Recording
from bench.loadgen.response import MalformedError, read_head
from bench.loadgen.stream import State, Stream
from bench.loadgen.target import Address, Target, encode_request, resolve
from bench.workloads.base import RequestSpec

_LEAD_NS = 300_000_000  # from the start of the loop to time 0, so that the first connections stand in time
_OPEN_AHEAD_NS = 250_000_000  # a connection is opened this long before its request is due
_TICK_NS = 200_000_000
_DONE_PATIENCE_NS = 1_000_000_000  # for the end of an answer that already said [DONE]
_DONE = b"data: [DONE]"


class Observer(Protocol):
    """Watches a load point from outside and may end it."""

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        """Called about 5 times a second with counts so far (finished excludes failed); False cuts the point short.

        Runs inside the loop, so it must be cheap; `now_s` is on the scale of the arrival times.
        """
        ...


@dataclass(slots=True)
class _Counts:
    sent: int = 0
    first_token: int = 0
    finished: int = 0
    failed: int = 0


def run_load(
    target: Target,
    specs: list[RequestSpec],
    times: np.ndarray,
    *,
    observer: Observer,
    time_limit_s: float,
    needed: int | None = None,
) -> Recording:
    """Send specs[i] at times[i] (seconds, sorted) whatever the server does, until all answers ended.

    Ends early when the observer says so or `time_limit_s` after time 0: what is open then is "cut short", what is not
    sent stays so. With `needed` it also ends once that many first requests ended: those after them only keep up the
    load meanwhile. Failures of requests are recorded; BenchError only when the host can't be found.
    """
    if len(specs) != len(times):
        raise ValueError(f"{len(specs)} requests for {len(times)} arrival times")
    address = resolve(target.base_url)
    _allow_descriptors(len(specs) + 64)
    payloads = [encode_request(target, address, spec) for spec in specs]
    with _no_collector():
        loop = _Loop(address, payloads, times, observer, time_limit_s, len(specs) if needed is None else needed)
        used, began = time.thread_time_ns(), time.monotonic_ns()
        try:
            loop.run()
        finally:
            loop.close()
        used, wall = time.thread_time_ns() - used, time.monotonic_ns() - began
    # A share of less than a second says nothing.
    cpu_share = used / max(1_000_000_000, wall)
    return Recording(loop.streams, specs, loop.start_ns, cpu_share=cpu_share, cut_short=loop.cut_short)


class _Loop:
    """Opens, sends, receives; `streams` is the record."""

    def __init__(
        self,
        address: Address,
        payloads: list[bytes],
        times: np.ndarray,
        observer: Observer,
        time_limit_s: float,
        needed: int,
    ):
        self._address = address
        self._observer = observer
        self._counts = _Counts()
        self._buffer = ReceiveBuffer()
        self._poller = Poller()
        self._live: dict[int, Stream] = {}  # by descriptor
        self._opened = 0  # streams before this one were opened
        self._due = 0  # streams before this one were due
        self._needed = needed  # streams before this one are waited for
        self._awaited = needed  # how many of them haven't ended
        self.cut_short = False
        offsets = np.round(np.asarray(times, dtype=np.float64) * 1e9).astype(np.int64)
        # Arrivals are stamped on the real-time clock, deadlines need the monotonic one: one start, read on both.
        self._start_mono = time.monotonic_ns() + _LEAD_NS
        self.start_ns = time.time_ns() + _LEAD_NS
        self._due_mono: list[int] = (offsets + self._start_mono).tolist()
        self._limit_mono = self._start_mono + round(min(time_limit_s, 1e9) * 1e9)
        self.streams = [
            Stream(index, payload, self.start_ns + offset)
            for index, (payload, offset) in enumerate(zip(payloads, offsets.tolist(), strict=True))
        ]

    def run(self) -> None:
        total = len(self.streams)
        next_tick = self._start_mono
        while True:
            now = time.monotonic_ns()
            self._open_and_send(now)
            if self._awaited <= 0:
                self.cut_short = self._due < total or bool(self._live)
                break
            if now >= next_tick:
                next_tick = now + _TICK_NS
                self._close_lingering()
                if not self._tick(now):
                    self.cut_short = True
                    break
            if now >= self._limit_mono:
                self.cut_short = True
                break
            wake = min(next_tick, self._limit_mono)
            if self._opened < total:
                wake = min(wake, self._due_mono[self._opened] - _OPEN_AHEAD_NS)
            if self._due < total:
                wake = min(wake, self._due_mono[self._due])
            for fd, mask in self._poller.wait(wake):
                stream = self._live.get(fd)
                if stream is not None:
                    self._handle(stream, mask)
        self._tick(time.monotonic_ns())

    def close(self) -> None:
        """Close what is open; what was sent and has no end is cut short."""
        for stream in list(self._live.values()):
            if stream.index < self._due and stream.failure is None and not stream.done_seen_ns:
                stream.failure = ("cut short", "")
            self._drop(stream)
        self._poller.close()

    def _tick(self, now: int) -> bool:
        counts = self._counts
        elapsed = (now - self._start_mono) / 1e9
        return self._observer.tick(elapsed, counts.sent, counts.first_token, counts.finished, counts.failed)

    def _open_and_send(self, now: int) -> None:
        while self._opened < len(self.streams) and self._due_mono[self._opened] - _OPEN_AHEAD_NS <= now:
            self._open(self.streams[self._opened])
            self._opened += 1
        while self._due < len(self.streams) and self._due_mono[self._due] <= now:
            stream = self.streams[self._due]
            self._due += 1
            if stream.state is State.READY:
                self._send(stream)

    def _open(self, stream: Stream) -> None:
        try:
            stream.connection = connect(self._address, self._buffer)
        except OSError as error:
            self._fail(stream, "connection", _cause(error))
            return
        stream.state = State.CONNECTING
        self._live[stream.connection.fileno()] = stream
        self._poller.watch(stream.connection.fileno(), WRITE)

    def _handle(self, stream: Stream, mask: int) -> None:
        try:
            if stream.state is State.CONNECTING:
                self._advance(stream)
            elif stream.state is State.SENDING and mask & WRITE:
                self._send_rest(stream)
            else:
                self._receive(stream)
        except OSError as error:
            self._fail(stream, "connection", _cause(error))

    def _advance(self, stream: Stream) -> None:
        assert stream.connection is not None
        wanted = stream.connection.advance()
        self._poller.watch(stream.connection.fileno(), wanted or READ)
        if wanted:
            return
        stream.state = State.READY
        stream.ready_ns = time.time_ns()
        if stream.index < self._due:
            self._send(stream)

    def _send(self, stream: Stream) -> None:
        self._counts.sent += 1
        stream.state = State.SENDING
        stream.sent_ns = time.time_ns()
        try:
            self._send_rest(stream)
        except OSError as error:
            self._fail(stream, "connection", _cause(error))

    def _send_rest(self, stream: Stream) -> None:
        assert stream.connection is not None
        fd = stream.connection.fileno()
        taken = stream.connection.send(stream.left)
        if taken != BLOCKED:
            stream.left = stream.left[taken:]
        if len(stream.left):
            # Read as well: a server may refuse a long request before it has read all of it.
            self._poller.watch(fd, READ | WRITE)
            return
        stream.state = State.RECEIVING
        self._poller.watch(fd, READ)

    def _receive(self, stream: Stream) -> None:
        assert stream.connection is not None
        count, stamp = stream.connection.receive()
        if count == BLOCKED:
            return
        if count == 0:
            self._end_of_stream(stream)
            return
        answer = stream.answer
        answer += self._buffer.view[:count]
        stream.ends.append(len(answer))
        stream.stamps.append(stamp)
        stream.read_ns.append(time.time_ns())
        if stream.head is None and not self._read_head(stream):
            return
        head = stream.head
        assert head is not None
        if not stream.answering and head.status == 200 and len(answer) > head.body_start:
            stream.answering = True
            self._counts.first_token += 1
        if head.complete(answer):
            self._finish(stream)
        elif not stream.done_seen_ns and answer.find(_DONE, max(0, len(answer) - count - len(_DONE))) >= 0:
            stream.done_seen_ns = stream.read_ns[-1]

    def _read_head(self, stream: Stream) -> bool:
        try:
            stream.head = read_head(stream.answer)
        except MalformedError as error:
            self._fail(stream, "malformed stream", str(error))
            return False
        return stream.head is not None

    def _end_of_stream(self, stream: Stream) -> None:
        """The server closed: the regular end only of an answer that says no length, or of one that said it is done."""
        head = stream.head
        if stream.done_seen_ns or (head is not None and not head.chunked and head.length is None):
            self._finish(stream)
            return
        moment = "before it answered" if not stream.answer else "in the middle of its answer"
        self._fail(stream, "connection", f"the server closed the connection {moment}")

    def _close_lingering(self) -> None:
        """Finish answers that said [DONE] but don't end, as from a server that ignores "Connection: close"."""
        patience_over = time.time_ns() - _DONE_PATIENCE_NS
        for stream in [s for s in self._live.values() if 0 < s.done_seen_ns < patience_over]:
            self._finish(stream)

    def _finish(self, stream: Stream) -> None:
        if stream.head is not None and stream.head.status == 200:
            self._counts.finished += 1
        else:
            self._counts.failed += 1
        self._drop(stream)

    def _fail(self, stream: Stream, status: str, error: str) -> None:
        stream.failure = (status, error)
        self._counts.failed += 1
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        if stream.state is not State.CLOSED and stream.index < self._needed:
            self._awaited -= 1
        stream.state = State.CLOSED
        stream.left = memoryview(b"")
        if stream.connection is None:
            return
        fd = stream.connection.fileno()
        if self._live.pop(fd, None) is not None:
            self._poller.forget(fd)
        stream.connection.close()
        stream.connection = None


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """No garbage collection meanwhile: a full pass over the records would be seen as a stall of the server."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _allow_descriptors(count: int) -> None:
    """Raise the soft limit of open files as far as needed and allowed; what doesn't fit fails as a connection."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256 if hard == resource.RLIM_INFINITY else min(count + 256, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _cause(error: OSError) -> str:
    return str(error.strerror or error).lower()
