"""Several generator processes for one load point: requests are assigned in turn, start together, and are merged.

Each child gets its requests as bytes, reports that it is ready, and starts at the time that the parent sends. It sends
its counts five times a second. The parent adds them up for the observer, and sends the children a message to end.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from bench.child_processes import end_with_parent
from bench.errors import BenchError
from bench.loadgen.job import Counts, Job, Observer, Running, Start
from bench.loadgen.process import run_here
from bench.loadgen.recording import GeneratorUse, Load, merged_use
from bench.loadgen.request import resolve
from bench.loadgen.stream import Stream
from bench.target.target import Target

_START_LIMIT_S = 60.0
_TICK_S = 0.2
_CUT, _ENOUGH = "cut", "enough"


@dataclass(slots=True)
class _Shard:
    """The parent's state of one child."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    part: range  # indices of its requests
    counts: Counts = dataclasses.field(default_factory=Counts)
    awaited: int = 1
    streams: list[Stream] | None = None
    use: GeneratorUse | None = None
    cut_short: bool = False


class _Shards:
    """All children as one load that runs."""

    def __init__(self, shards: list[_Shard]):
        self._shards = shards
        self.hold = False

    @property
    def awaited(self) -> int:
        return sum(max(0, shard.awaited) for shard in self._shards)


def run_shards(
    job: Job,
    processes: int,
    observer: Observer,
    begin: Callable[[], Start],
    attach: Callable[[Running], None] | None = None,
    *,
    target: Target,
) -> Load:
    """Run a job on several processes; other arguments as of `run_here`.

    Raises BenchError if one of them dies, since a part of the load is missing.
    """
    with _children(processes, len(job.payloads)) as shards:
        for number, shard in enumerate(shards):
            # A TLS context cannot be pickled: each child resolves the address itself.
            part = dataclasses.replace(_part(job, shard.part, number, processes), address=None)  # type: ignore[arg-type]
            shard.pipe.send((part, target))
        for shard in shards:
            if not shard.pipe.poll(_START_LIMIT_S):
                raise BenchError(f"a generator process did not start within {_START_LIMIT_S:.0f} s")
            _receive(shard)
        start, running = begin(), _Shards(shards)
        if attach is not None:
            attach(running)
        for shard in shards:
            shard.pipe.send(start)
        try:
            _supervise(shards, observer, start, running)
        except BaseException:
            _send_all(shards, _CUT)
            raise
    streams = _merged(shards, len(job.payloads))
    use = merged_use([s.use for s in shards if s.use is not None])
    return Load(streams, start.real_ns, use, any(s.cut_short for s in shards))


def _part(job: Job, part: range, number: int, processes: int) -> Job:
    """The job of one child: its requests, and its share of the concurrency."""
    concurrency = job.concurrency
    if concurrency is not None:
        concurrency = concurrency // processes + (number < concurrency % processes)
    return dataclasses.replace(
        job,
        payloads=[job.payloads[i] for i in part],
        offsets_ns=[job.offsets_ns[i] for i in part] if job.concurrency is None else [],
        needed=sum(i < job.needed for i in part),
        concurrency=concurrency,
    )


@contextlib.contextmanager
def _children(processes: int, requests: int) -> Iterator[list[_Shard]]:
    shards: list[_Shard] = []
    try:
        for number in range(processes):
            ours, theirs = Pipe()
            command = [sys.executable, "-m", "bench.loadgen.shards", str(theirs.fileno()), str(os.getpid())]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            theirs.close()
            shards.append(_Shard(process, ours, range(number, requests, processes)))
        yield shards
    finally:
        for shard in shards:
            shard.pipe.close()  # a child ends when its pipe is closed
        for shard in shards:
            try:
                shard.process.wait(5.0)
            except subprocess.TimeoutExpired:
                shard.process.kill()
                shard.process.wait()


def _supervise(shards: list[_Shard], observer: Observer, start: Start, running: Running) -> None:
    """Add up the children's counts until each has sent its recording."""
    word = ""  # sent to the children
    next_tick = 0.0
    while any(s.streams is None for s in shards):
        pipes: list[Connection] = [s.pipe for s in shards if s.streams is None]
        for pipe in wait(pipes, timeout=_TICK_S):
            _receive(next(s for s in shards if s.pipe is pipe))
        now = time.monotonic()
        if now >= next_tick:
            next_tick = now + _TICK_S / 2
            if not _observe(shards, observer, start) and not word:
                word = _CUT
                _send_all(shards, word)
        if not word and not running.hold and running.awaited <= 0:
            word = _ENOUGH
            _send_all(shards, word)
    _observe(shards, observer, start)


def _observe(shards: list[_Shard], observer: Observer, start: Start) -> bool:
    elapsed = (time.monotonic_ns() - start.mono_ns) / 1e9
    if elapsed < 0:
        return True
    totals = [sum(getattr(s.counts, name) for s in shards) for name in ("sent", "first_token", "finished", "failed")]
    return observer.tick(elapsed, *totals)


def _receive(shard: _Shard) -> None:
    try:
        message = shard.pipe.recv()
    except (EOFError, ConnectionResetError):
        code = shard.process.wait()
        raise BenchError(f"a generator process ended with exit code {code} in the middle of a load point") from None
    if message == "ready":
        return
    shard.counts, shard.awaited = message[:2]
    if len(message) > 2:
        shard.streams, shard.use, shard.cut_short = message[2:]
        shard.awaited = 0


def _send_all(shards: list[_Shard], word: str) -> None:
    for shard in shards:
        if shard.streams is None:
            with contextlib.suppress(OSError):
                shard.pipe.send(word)


def _merged(shards: Sequence[_Shard], count: int) -> list[Stream]:
    merged: list[Stream | None] = [None] * count
    for shard in shards:
        assert shard.streams is not None
        for index, stream in zip(shard.part, shard.streams, strict=True):
            stream.index = index
            merged[index] = stream
    return [s for s in merged if s is not None]


class _Reporter:
    """The child's observer: sends counts to the parent, and receives the word to end."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self._running: Running | None = None
        self._counts = Counts()

    def begin(self) -> Start:
        self._pipe.send("ready")
        start: Start = self._pipe.recv()
        return start

    def attach(self, running: Running) -> None:
        running.hold = True
        self._running = running

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:  # noqa: ARG002
        assert self._running is not None
        self._counts = Counts(sent, first_token, finished, failed)
        self._pipe.send((self._counts, self._running.awaited))
        while self._pipe.poll():
            word = self._pipe.recv()
            if word == _CUT:
                return False
            self._running.hold = False
        return True

    def end(self, load: Load) -> None:
        self._pipe.send((self._counts, 0, load.streams, load.use, load.cut_short))


def _child(pipe: Connection) -> None:
    job, target = pipe.recv()
    reporter = _Reporter(pipe)
    job = dataclasses.replace(job, address=resolve(target))
    reporter.end(run_here(job, reporter, reporter.begin, reporter.attach))


def main() -> None:
    """Run a child: python -m bench.loadgen.shards FD PARENT."""
    end_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the parent handles it
    try:
        _child(Connection(int(sys.argv[1])))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(1)  # the parent is gone


if __name__ == "__main__":
    main()
