"""The loop of one generator process: one thread, one epoll set, one connection per stream; nothing is parsed in it."""

import errno
import time

from bench.loadgen.connection import BLOCKED, Connection, ReceiveBuffer, connect
from bench.loadgen.job import Counts, Job, Observer, Start
from bench.loadgen.poller import READ, WRITE, Poller
from bench.loadgen.response import MalformedError, read_head
from bench.loadgen.schedule import Schedule
from bench.loadgen.stream import GENERATOR, State, Stream

_TICK_NS = 200_000_000
_TICK_DELAY_NS = 100_000_000  # up to which a tick is put off because of sends …
_TICK_LENGTH_NS = 3_000_000  # … that are due within this time
_OPEN_DELAY_NS, _OPEN_LENGTH_NS = 5_000_000, 200_000  # the same for opening a connection
_MOST_SENDS = 32  # in a row, so that many sends do not delay reads
_MOST_CHECKS = 256  # streams per tick that are checked for an end that was missed
_DONE_TIMEOUT_NS = 1_000_000_000  # wait for the end of a response after [DONE]
# What this host lacks if a connection cannot be opened.
_LACKS = {
    errno.EMFILE: "too many open files: raise the limit of the generator (`ulimit -n`)",
    errno.ENFILE: "too many open files on the host of the generator",
    errno.EADDRNOTAVAIL: "no free port: widen net.ipv4.ip_local_port_range of the generator's host, or use more hosts",
}


class Loop:
    """Opens connections, sends requests, receives responses; `streams` is the recording."""

    def __init__(self, job: Job, observer: Observer, start: Start):
        self._address = job.address
        self._observer = observer
        self._closed_loop = job.concurrency is not None
        self.counts = Counts()
        self._buffer = ReceiveBuffer()
        self._poller = Poller()
        self._live: dict[int, Stream] = {}  # by descriptor
        self._idle: dict[int, Connection] = {}  # connections without a request, the last used one last
        self._opened = 0  # index of the first stream that was not opened yet
        self._due = 0  # index of the first stream that is not due yet
        self._needed = job.needed  # index of the first stream that is not waited for
        self.awaited = job.needed  # number of streams before it that have not ended
        self.hold = False  # continue when none is awaited: another process still waits for one of its streams
        self._first = min(job.concurrency or 0, len(job.payloads))  # closed loop: number of requests at time 0
        self._free = 0  # closed loop: number of requests that may be sent …
        self._freed_ns = 0  # … and when the last of them became possible
        self.cut_short = False
        self._start = start
        self.start_ns = start.real_ns
        schedule = Schedule.of(job, start)
        self._due_mono, self._open_mono, self._most_polled = schedule.due, schedule.opened, schedule.polled_ns
        self._limit_mono = start.mono_ns + round(min(job.time_limit_s, 1e9) * 1e9)
        self._next_tick, self._latest_tick = start.mono_ns, start.mono_ns + _TICK_DELAY_NS
        self._wake = 0
        self._polled = 0  # before the wake-up
        self._unchecked: list[Stream] = []  # for a missed end, since all were checked
        self.streams = [
            Stream(index, payload, start.real_ns + offset)
            for index, (payload, offset) in enumerate(zip(job.payloads, schedule.offsets, strict=True))
        ]

    def run(self) -> None:
        live, wait, clock = self._live, self._poller.wait, time.monotonic_ns
        receiving = State.RECEIVING
        while True:
            now = clock()
            if now >= self._wake and not self._on_time(now):
                self.cut_short = True
                break
            if self.awaited <= 0 and self._may_end():
                break
            polled = self._polled
            for fd, mask in wait(self._wake, polled):
                stream = live.get(fd)
                if stream is None:
                    self._forget_idle(fd)
                    continue
                try:
                    if stream.state is receiving:
                        self._receive(stream)
                    else:
                        self._handle(stream, mask)
                except OSError as error:
                    self._lost(stream, _cause(error))
                except MalformedError as error:
                    self._fail(stream, "malformed stream", str(error))
                if polled and clock() >= self._wake:
                    break  # a send is due: the next wait returns what is left
            if self._free:
                self._send_next()
        self._tick(clock())

    def close(self) -> None:
        """Close all connections; requests that were sent and have not ended are cut short."""
        for stream in list(self._live.values()):
            if stream.index < self._due and stream.failure is None and not stream.is_done():
                stream.failure = ("cut short", "")
            self._drop(stream)
        for connection in self._idle.values():
            connection.close()
        self._idle.clear()
        for stream in self.streams:
            stream.payload, stream.left = b"", None
        self._poller.close()

    def _may_end(self) -> bool:
        left = self._due < len(self.streams) or bool(self._live)
        if self.hold and left:
            return False
        self.cut_short = left
        return True

    def _on_time(self, now: int) -> bool:
        """Do everything that is due, and set the time of the next wake-up; False if the load point is over."""
        self._open_and_send(now)
        if now >= self._next_tick and not self._put_off_tick(now):
            self._next_tick = now + _TICK_NS
            self._latest_tick = self._next_tick + _TICK_DELAY_NS
            self._close_lingering()
            if not self._tick(now):
                return False
        if now >= self._limit_mono:
            return False
        self._plan_wake()
        return True

    def _put_off_tick(self, now: int) -> bool:
        """Move a tick behind the next send, which it would delay."""
        if now >= self._latest_tick or not self._sends_within(now + _TICK_LENGTH_NS):
            return False
        self._next_tick = min(self._due_mono[self._due], self._latest_tick)
        return True

    def _sends_within(self, moment: int) -> bool:
        return self._due < len(self.streams) and self._due_mono[self._due] < moment

    def _plan_wake(self) -> None:
        wake = min(self._next_tick, self._limit_mono)
        self._polled = 0
        if self._opened < len(self.streams):
            wake = min(wake, self._open_mono[self._opened])
        if self._sends_within(wake + _OPEN_LENGTH_NS):
            wake, self._polled = self._due_mono[self._due], self._most_polled
        self._wake = wake

    def _tick(self, now: int) -> bool:
        counts = self.counts
        elapsed = (now - self._start.mono_ns) / 1e9
        return self._observer.tick(elapsed, counts.sent, counts.first_token, counts.finished, counts.failed)

    def _open_and_send(self, now: int) -> None:
        last = min(len(self.streams), self._due + _MOST_SENDS)
        while self._due < last and self._due_mono[self._due] <= now:
            stream = self.streams[self._due]
            self._due += 1
            if self._closed_loop:
                stream.intended_ns = time.time_ns()
            if stream.state is State.READY:
                self._send(stream)
            elif stream.state is State.CLOSED:
                self._free += self._closed_loop  # it failed before it was due
        if self._most_polled and self._sends_within(now + _OPEN_LENGTH_NS):
            now -= _OPEN_DELAY_NS
        while self._opened < len(self.streams) and self._open_mono[self._opened] <= now:
            stream = self.streams[self._opened]
            self._opened += 1
            self._open(stream)
            if stream.index < self._due and stream.state is State.READY:
                self._send(stream)  # it was due before it could be opened
        if self._free:
            self._send_next()

    def _send_next(self) -> None:
        """Closed loop: send one request for each one that ended, once the first ones are sent."""
        if self._due < self._first:
            return
        while self._free and self._due < len(self.streams):
            self._free -= 1
            stream = self.streams[self._due]
            self._due += 1
            stream.freed_ns = self._freed_ns
            stream.intended_ns = time.time_ns()
            if self._opened < self._due:
                self._opened = self._due
                self._open(stream)
            if stream.state is State.READY:
                self._send(stream)
        self._free = 0

    def _open(self, stream: Stream) -> None:
        """Assign a connection to a stream: an idle one, else a new one."""
        if self._idle:
            fd, stream.connection = self._idle.popitem()
            stream.reused = True
            stream.state = State.READY
            stream.ready_ns = time.time_ns()
            self._live[fd] = stream
            return
        try:
            stream.connection = connect(self._address, self._buffer)
        except OSError as error:
            lack = _LACKS.get(error.errno or 0)
            self._fail(stream, GENERATOR if lack else "connection", lack or _cause(error))
            return
        stream.state = State.CONNECTING
        self._live[stream.connection.fileno()] = stream
        self._poller.watch(stream.connection.fileno(), WRITE)

    def _handle(self, stream: Stream, mask: int) -> None:
        if stream.state is State.CONNECTING:
            self._advance(stream)
        elif stream.state is State.SENDING and mask & WRITE:
            self._send_rest(stream)
        else:
            self._receive(stream)

    def _advance(self, stream: Stream) -> None:
        assert stream.connection is not None
        wanted = stream.connection.advance()
        self._poller.change(stream.connection.fileno(), wanted or READ)
        if wanted:
            return
        stream.state = State.READY
        stream.ready_ns = time.time_ns()
        if stream.index < self._due:
            self._send(stream)

    def _send(self, stream: Stream) -> None:
        if not stream.sent_ns:
            self.counts.sent += 1
        stream.state = State.SENDING
        stream.left = memoryview(stream.payload)
        stream.sent_ns = time.time_ns()
        try:
            self._send_rest(stream, first=True)
        except OSError as error:
            self._lost(stream, _cause(error))

    def _send_rest(self, stream: Stream, *, first: bool = False) -> None:
        assert stream.connection is not None
        assert stream.left is not None
        taken = stream.connection.send(stream.left)
        if taken != BLOCKED:
            stream.left = stream.left[taken:]
        if len(stream.left):
            if first:
                # Also wait for reads: a server may reject a long request before it has received all of it.
                self._poller.change(stream.connection.fileno(), READ | WRITE)
            return
        stream.left = None
        stream.state = State.RECEIVING
        if not first:
            self._poller.change(stream.connection.fileno(), READ)

    def _receive(self, stream: Stream) -> None:
        count, stamp = stream.connection.receive()  # type: ignore[union-attr]
        if count <= 0:
            if count == 0:
                self._end_of_stream(stream)
            return
        response = stream.response
        response += self._buffer.view[:count]
        stream.ends.append(len(response))
        stream.stamps.append(stamp)
        stream.read_ns.append(time.time_ns())
        if not stream.body_started and not self._read_head(stream):
            return
        if stream.ending.reached(response):  # type: ignore[union-attr]
            self._finish(stream)

    def _read_head(self, stream: Stream) -> bool:
        """Whether the head is complete; counts the first byte of the body of a 200. Raises MalformedError."""
        if stream.head is None:
            stream.head = read_head(stream.response)
            if stream.head is not None:
                stream.ending = stream.head.ending()
        head = stream.head
        if head is not None and head.status == 200 and len(stream.response) > head.body_start:
            stream.body_started = True
            self.counts.first_token += 1
        return head is not None

    def _end_of_stream(self, stream: Stream) -> None:
        """The server closed the connection: the regular end of a response without a length, or after [DONE]."""
        head, ending = stream.head, stream.ending
        if head is not None and ending is not None:
            until_close = not head.chunked and head.length is None
            if until_close or stream.is_done() or ending.find(stream.response):
                self._finish(stream, ended=True)
                return
        moment = "before it answered" if not stream.response else "in the middle of the response"
        self._lost(stream, f"the server closed the connection {moment}")

    def _lost(self, stream: Stream, error: str) -> None:
        """A connection broke. If it was reused and the server had closed it, the request is sent again."""
        if stream.state is State.SENDING and self._refused_early(stream):
            return
        if stream.reused and not stream.response and stream.failure is None:
            self._disconnect(stream)
            stream.reused, stream.left = False, None
            for fd in list(self._idle):
                self._forget_idle(fd)  # as old as this one: the server will close them too
            self._open(stream)
            return
        self._fail(stream, "connection", error)

    def _refused_early(self, stream: Stream) -> bool:
        """Whether the response to a request that could not be sent completely is there.

        A server may reject a long request before it has received it, and close: its response can still be read.
        """
        stream.state = State.RECEIVING
        known = -1
        try:
            while stream.state is State.RECEIVING and len(stream.response) > known:
                known = len(stream.response)
                self._receive(stream)
        except MalformedError as error:
            self._fail(stream, "malformed stream", str(error))
        except OSError:
            return False
        return stream.state is not State.RECEIVING

    def _forget_idle(self, fd: int) -> None:
        """Close an idle connection: the server closed it or sent unexpected bytes."""
        connection = self._idle.pop(fd, None)
        if connection is not None:
            self._poller.forget(fd)
            connection.close()

    def _close_lingering(self) -> None:
        """End responses without further bytes: complete ones followed by extra bytes, and those with [DONE]."""
        if not self._unchecked:
            self._unchecked = list(self._live.values())
        now = time.time_ns()
        for _ in range(min(len(self._unchecked), _MOST_CHECKS)):
            stream = self._unchecked.pop()
            if stream.state is State.CLOSED or stream.ending is None or stream.read_ns[-1] >= now - _TICK_NS:
                continue
            try:
                followed = stream.ending.find(stream.response)
                if followed or (stream.read_ns[-1] < now - _DONE_TIMEOUT_NS and stream.is_done()):
                    stream.unended = True
                    self._finish(stream, ended=True)
            except MalformedError as error:
                self._fail(stream, "malformed stream", str(error))

    def _finish(self, stream: Stream, *, ended: bool = False) -> None:
        """The response is complete; `ended`: its connection cannot be reused."""
        head = stream.head
        if head is not None and head.status == 200:
            self.counts.finished += 1
        else:
            self.counts.failed += 1
        exact = stream.ending is not None and stream.ending.end == len(stream.response)
        if head is not None and head.keeps and exact and not ended and stream.connection and not stream.left:
            fd = stream.connection.fileno()
            del self._live[fd]
            self._idle[fd] = stream.connection
            stream.connection = None
        self._drop(stream)

    def _fail(self, stream: Stream, status: str, error: str) -> None:
        stream.failure = (status, error)
        self.counts.failed += 1
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        if stream.state is not State.CLOSED:
            self.awaited -= stream.index < self._needed
            self._free += self._closed_loop and stream.index < self._due
            self._freed_ns = stream.stamps[-1] if stream.stamps else 0
        stream.state = State.CLOSED
        stream.payload, stream.left = b"", None
        self._disconnect(stream)

    def _disconnect(self, stream: Stream) -> None:
        if stream.connection is None:
            return
        fd = stream.connection.fileno()
        if self._live.pop(fd, None) is not None:
            self._poller.forget(fd)
        stream.connection.close()
        stream.connection = None


def _cause(error: OSError) -> str:
    return str(error.strerror or error).lower()
