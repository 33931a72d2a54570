"""The pool of processes in which a front end has multimodal inputs decoded and processed.

    submit() ─► queue in order ─► process: one job at a time over its socket ─► feature file, and its Done

Processes start when jobs wait for them, up to their number. One that dies fails only the job that it had, and the next
job gets a new one; so does one that takes too long, or whose memory has grown. The front end's loop only copies bytes
to and from sockets.
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from engine import children
from engine.children import ChildProcess
from engine.errors import ProcessingError, RedlineError, RequestError, SharedMemoryFullError, cause_of
from engine.multimodal.feature_files import unlink_features
from engine.multimodal.pool_protocol import (
    HEAD_BYTES,
    Answer,
    Done,
    Failed,
    Job,
    PoolOptions,
    Started,
    decode_answer,
    encode,
)
from engine.multimodal.types import Media

log = logging.getLogger("redline.mm")

JOB_TIMEOUT_S = 120.0  # of one input
GROWTH = 512 << 20  # bytes that the memory of a process may grow by before it is replaced
START_TIMEOUT_S = 300.0
EXIT_TIMEOUT_S = 5.0
BACK_OFF_S, LONGEST_BACK_OFF_S = 0.5, 30.0  # before a process is started again after a failed start
# One thread each, since there are several processes.
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
}


class Counters(Protocol):
    """Where the pool counts: jobs, failures, seconds; waiting and processes are gauges."""

    def add(self, name: str, value: float = 1) -> None: ...

    def set(self, name: str, value: float) -> None: ...


@dataclass(slots=True)
class _Waiting:
    """A job, and the future of its answer."""

    job: Job
    data: bytes
    done: "asyncio.Future[Done]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class _DiedError(Exception):
    """A process has ended by itself; the message is how."""


class _Process:
    """A process of the pool as the front end sees it."""

    def __init__(self, child: ChildProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.child = child
        self.resident = 0  # bytes of its memory when it had started
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, options: PoolOptions, spawn: Callable[[PoolOptions], ChildProcess]) -> "_Process":
        """Start a process and wait until it has made its processor. Raises RedlineError if it can't.

        `spawn` is called on a thread.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            options = msgspec.structs.replace(options, socket=theirs.fileno())
            child = await asyncio.to_thread(spawn, options)
        ours.setblocking(False)
        process = cls(child, *await asyncio.open_connection(sock=ours))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                answer = await process._answer()
            if isinstance(answer, Failed):
                raise ProcessingError(f"multimodal inputs can't be processed: {answer.failure.message}")
        except _DiedError as error:
            raise ProcessingError(f"multimodal inputs can't be processed: {error}") from None
        except TimeoutError:
            await process.end()
            raise ProcessingError(
                f"multimodal inputs can't be processed: a process did not start within {START_TIMEOUT_S:g} s"
            ) from None
        except BaseException:
            await process.end()
            raise
        process.resident = answer.resident
        return process

    async def run(self, waiting: _Waiting) -> Answer:
        """Run a job. Raises _DiedError if the process ends."""
        try:
            self._writer.write(children.frame(encode(waiting.job)))
            self._writer.write(len(waiting.data).to_bytes(HEAD_BYTES, "little"))
            self._writer.write(waiting.data)
            await self._writer.drain()
        except OSError:
            raise await self._death() from None
        return await self._answer()

    @property
    def is_gone(self) -> bool:
        """Whether it has ended."""
        return self._reader.at_eof() or self.child.returncode is not None

    async def _answer(self) -> Answer:
        try:
            head = await self._reader.readexactly(HEAD_BYTES)
            return decode_answer(await self._reader.readexactly(int.from_bytes(head, "little")))
        except (asyncio.IncompleteReadError, OSError):
            raise await self._death() from None

    async def _death(self) -> _DiedError:
        ended = await asyncio.to_thread(self.child.wait, EXIT_TIMEOUT_S)
        cause = self.child.error(None) if ended else f"{self.child.name} closed its socket"
        await self.end()
        return _DiedError(str(cause))

    async def end(self) -> None:
        """End it by force; safe to call twice."""
        self.kill()
        await asyncio.to_thread(self.child.wait)
        self.child.close()

    def kill(self) -> None:
        """End it by force, without waiting."""
        self.child.kill()
        self._writer.close()


class MediaPool:
    """The processes of one front end; lives in one event loop."""

    def __init__(self, options: PoolOptions, processes: int, counters: Counters, job_timeout_s: float = JOB_TIMEOUT_S):
        """Make a pool of at most this number of processes; `open` starts the first."""
        self._options = options
        self._most = processes
        self._counters = counters
        self._job_timeout_s = job_timeout_s
        self._queue: deque[_Waiting] = deque()
        self._wake = asyncio.Event()
        self._idle = 0  # processes that wait for a job, and those that start
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: set[_Process] = set()
        self._children: list[ChildProcess] = []  # those that start, too
        self._has_started = asyncio.Event()
        self._closed = False

    def open(self) -> None:
        """Start the first process; called inside the event loop."""
        self._add_process()

    async def started(self) -> None:
        """Wait until the first process takes jobs, or can't be started, which the log and the first job report."""
        await self._has_started.wait()

    async def submit(self, media: Media, count: int, options: Mapping[str, Any], path: str) -> Done:
        """Process an input in the order of the calls, and write its features to a new file.

        If the caller is canceled while the job waits, the job is dropped.

        Args:
            count: number of inputs of the kind in the prompt.
            options: for the processor.
            path: of the file.

        Raises:
            RequestError: the model can't take this input.
            ProcessingError: it could not be processed through no fault of its own, for example if its process died.
        """
        if self._closed:
            raise ProcessingError("the server was stopped before this input was processed")
        waiting = _Waiting(Job(media.kind, count, dict(options), path), media.data)
        self._queue.append(waiting)
        self._counters.set("waiting", len(self._queue))
        if self._idle < len(self._queue) and len(self._tasks) < self._most:
            self._add_process()
        self._wake.set()
        try:
            return await waiting.done
        finally:
            if waiting in self._queue:
                self._queue.remove(waiting)
                self._counters.set("waiting", len(self._queue))

    def close(self) -> None:
        """Kill all processes; jobs fail."""
        self._closed = True
        self._has_started.set()
        for task in self._tasks:
            task.cancel()
        for child in self._children:
            child.kill()
        self._fail_queued(ProcessingError("the server was stopped before this input was processed"))

    @property
    def pids(self) -> list[int]:
        """Of the processes that have started."""
        return [process.child.pid for process in self._processes]

    def _spawn(self, options: PoolOptions) -> ChildProcess:
        child = ChildProcess(
            "engine.multimodal.pool_process",
            options,
            name="a process for multimodal inputs",
            inherit=(options.socket,),
            memory_advice="lower --mm-processors",
            environment=ENVIRONMENT,
        )
        self._children = [one for one in self._children if one.returncode is None] + [child]
        if self._closed:  # meanwhile
            child.kill()
        return child

    def _add_process(self) -> None:
        self._idle += 1
        self._tasks.append(asyncio.ensure_future(self._keep_process()))

    async def _keep_process(self) -> None:
        """Run jobs in one process after the other: the next is started when the last has ended and a job waits."""
        pause = BACK_OFF_S
        while True:
            try:
                process = await _Process.start(self._options, self._spawn)
            except Exception as error:
                if not isinstance(error, RedlineError):
                    log.exception("a process for multimodal inputs could not be started")
                    error = ProcessingError(f"multimodal inputs can't be processed: {cause_of(error)}")
                log.error("%s", error)
                self._has_started.set()
                self._fail_queued(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_BACK_OFF_S)
                await self._wait_for_jobs()
                continue
            pause = BACK_OFF_S
            self._processes.add(process)
            self._has_started.set()
            self._counters.set("processes", len(self._processes))
            try:
                await self._run_jobs(process)
            finally:
                self._processes.discard(process)
                self._counters.set("processes", len(self._processes))
                process.kill()
            await process.end()

    async def _wait_for_jobs(self) -> None:
        while not self._queue:
            self._wake.clear()
            await self._wake.wait()

    async def _run_jobs(self, process: _Process) -> None:
        """Run jobs in a process until it ends or must be replaced."""
        while True:
            await self._wait_for_jobs()
            if process.is_gone:  # while it had no job
                log.error("%s has ended and is replaced", process.child.name)
                return
            waiting = self._queue.popleft()
            self._counters.set("waiting", len(self._queue))
            self._idle -= 1
            try:
                resident = await self._run_job(process, waiting)
            finally:
                self._idle += 1
                waiting.fail(ProcessingError("the server was stopped before this input was processed"))
            if resident is None:
                return
            if resident > process.resident + GROWTH:
                log.info("%s is replaced: its memory has grown to %d MiB", process.child.name, resident >> 20)
                return

    async def _run_job(self, process: _Process, waiting: _Waiting) -> int | None:
        """Run one job; returns the bytes of the process's memory, None if it is gone."""
        try:
            async with asyncio.timeout(self._job_timeout_s):
                answer = await process.run(waiting)
        except TimeoutError:
            self._counters.add("failures")
            unlink_features(waiting.job.path)
            waiting.fail(RequestError(f"the {waiting.job.kind} was not processed within {self._job_timeout_s:g} s"))
            return None
        except _DiedError as error:
            self._counters.add("failures")
            log.error("%s; the %s that it processed fails, and it is replaced", error, waiting.job.kind)
            unlink_features(waiting.job.path)
            waiting.fail(ProcessingError(f"the {waiting.job.kind} could not be processed: {error}"))
            return None
        assert not isinstance(answer, Started), "a process starts once"
        self._counters.add("jobs")
        self._counters.add("seconds", answer.seconds)
        if isinstance(answer, Failed):
            self._counters.add("failures")
            waiting.fail(_error_of(answer))
        elif not waiting.done.done():
            waiting.done.set_result(answer)
        else:  # nobody waits for it any longer
            unlink_features(waiting.job.path)
        return answer.resident

    def _fail_queued(self, error: Exception) -> None:
        queued, self._queue = self._queue, deque()
        self._counters.set("waiting", 0)
        for waiting in queued:
            waiting.fail(error)


def _error_of(answer: Failed) -> RedlineError:
    message = answer.failure.message
    if answer.failure.kind == RequestError.__name__:
        return RequestError(message, answer.field)
    if answer.failure.kind == SharedMemoryFullError.__name__:
        return SharedMemoryFullError(message)
    return ProcessingError(message)
