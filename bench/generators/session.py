"""The generator's side of a connection to a run: prepares loads, runs them, and sends what they recorded."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.errors import BenchError
from bench.generators.channel import Channel, ChannelError
from bench.generators.messages import (
    AnyMessage,
    Begin,
    Collect,
    Cut,
    Ended,
    Enough,
    Failed,
    Ping,
    Pong,
    Prepare,
    Progress,
    Ready,
    Recorded,
    Requests,
    Streams,
)
from bench.loadgen.job import Counts, Job, Running, Start
from bench.loadgen.load import processes_for, run_job
from bench.loadgen.recording import Load
from bench.loadgen.request import resolve
from bench.target.target import Target

BATCH_BYTES = 4 << 20  # of requests or recordings in one message
_REQUESTS_LIMIT_S = 60.0  # between two messages with requests
_BEGIN_LIMIT_S = 300.0  # the run waits for its slowest generator


class Session:
    """Serves one run until it closes the connection.

    Args:
        channel: to the run, after the handshake.
        show: called with a line about each load.
    """

    def __init__(self, channel: Channel, show: Callable[[str], None]):
        self._channel = channel
        self._show = show
        self._load: Load | None = None  # the last one, until it is collected

    def serve(self) -> None:
        """Raises ChannelError when the run is gone."""
        while True:
            message = self._channel.receive(None)
            received_ns = time.time_ns()
            if isinstance(message, Ping):
                self._channel.send(Pong(received_ns, time.time_ns()))
            elif isinstance(message, Prepare):
                self._load = None
                self._run(message)
            elif isinstance(message, Collect) and self._load is not None:
                self._send_recording(self._load)
                self._load = None
            elif not isinstance(message, Cut | Enough):  # these may arrive after the load has ended by itself
                raise ChannelError("does not speak the protocol of redline bench")

    def _run(self, prepare: Prepare) -> None:
        payloads: list[bytes] = []
        while len(payloads) < prepare.count:
            message = self._channel.receive(_REQUESTS_LIMIT_S)
            if not isinstance(message, Requests):
                raise ChannelError("did not send its requests")
            payloads += message.payloads
        reporter = _Reporter(self._channel)
        try:
            with _target(prepare) as target:
                job = Job(
                    resolve(target), payloads, np.frombuffer(prepare.offsets_ns, dtype=np.int64).tolist(),
                    prepare.time_limit_s, prepare.needed, prepare.concurrency,
                )  # fmt: skip
                processes = min(processes_for(prepare.chunks_per_s), prepare.concurrency or prepare.count)
                load = run_job(job, processes, reporter, target, reporter.begin, reporter.attach)
        except BenchError as error:
            self._show(f"a load for {self._channel.peer} failed: {error}")
            self._channel.send(Failed(str(error)))
            return
        reporter.check()
        use, counts = load.use, reporter.counts
        self._load = load
        self._channel.send(Ended(use.cpu_s, use.cpu_share, use.starved_share, use.processes, load.cut_short))
        self._show(
            f"load for {self._channel.peer} on {prepare.base_url}: {counts.sent} of {prepare.count} requests sent, "
            f"{counts.finished} completed, {counts.failed} failed"
        )

    def _send_recording(self, load: Load) -> None:
        batch: list[Recorded] = []
        size = 0
        for stream in load.streams:
            if not stream.begun:
                continue
            batch.append(Recorded.of(stream))
            size += len(stream.response) + 24 * len(stream.ends)
            if size >= BATCH_BYTES:
                self._channel.send(Streams(batch, last=False))
                batch, size = [], 0
        self._channel.send(Streams(batch, last=True))


class _Reporter:
    """The observer of a load: sends its counts to the run, and receives the message that ends it."""

    def __init__(self, channel: Channel):
        self.counts = Counts()
        self._channel = channel
        self._running: Running | None = None
        self._gone: ChannelError | None = None

    def begin(self) -> Start:
        """Report that the load is prepared; answers round trips until the run says when it begins."""
        self._channel.send(Ready())
        while True:
            message: AnyMessage | None = self._channel.receive(_BEGIN_LIMIT_S)
            received_ns = time.time_ns()
            if isinstance(message, Ping):
                self._channel.send(Pong(received_ns, time.time_ns()))
            elif isinstance(message, Begin):
                return Start.at(message.at_ns)
            else:
                raise ChannelError("did not begin the load")

    def attach(self, running: Running) -> None:
        running.hold = True
        self._running = running

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:  # noqa: ARG002
        assert self._running is not None
        self.counts = Counts(sent, first_token, finished, failed)
        try:
            self._channel.send(Progress(sent, first_token, finished, failed, self._running.awaited))
            while (message := self._channel.receive(0.0)) is not None:
                if isinstance(message, Cut):
                    return False
                if isinstance(message, Enough):
                    self._running.hold = False
        except ChannelError as error:
            self._gone = error
            return False
        return True

    def check(self) -> None:
        """Raise the ChannelError that ended the load, if one did."""
        if self._gone is not None:
            raise self._gone


@contextlib.contextmanager
def _target(prepare: Prepare) -> Iterator[Target]:
    """The target of a load. Only its address counts: requests are encoded."""
    target = Target(prepare.base_url, insecure=prepare.insecure)
    if prepare.ca is None:
        yield target
        return
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(prepare.ca)
        file.flush()
        yield replace(target, ca=str(Path(file.name)))
