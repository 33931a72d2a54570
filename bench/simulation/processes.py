"""Runs simulations in several processes: each is single-threaded and independent of the others."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from bench.child_processes import end_with_parent
from bench.errors import BenchError

Result = TypeVar("Result")
Report = Callable[[Any], None]

END_S = 10.0  # for interrupted jobs to save what they have measured; then their processes are killed
_REPORT, _RESULT, _ERROR = "report", "result", "error"


def run_all(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], processes: int, show: Callable[[int, Any], None]
) -> Generator[tuple[int, Result], None, None]:
    """Call `function(report, *job)` for each job; yields the number of the job and the result, as they end.

    With one process, or for one job, everything runs in this process. After Ctrl-C, an error, or `close` of the
    generator, no further job begins, and those in progress get SIGTERM and END_S seconds. Ctrl-C in a terminal reaches
    this process only.

    Args:
        function: of a module, since it runs in other processes. It may pass anything that can be pickled to `report`.
        jobs: arguments of the calls, which begin in this order.
        processes: at most.
        show: called here with the number of the job and what it reported.

    Raises BenchError if a process was killed, KeyboardInterrupt, and what the function raises.
    """
    if processes == 1 or len(jobs) == 1:
        for number, job in enumerate(jobs):
            yield number, function(lambda what, number=number: show(number, what), *job)
        return
    workers: list[_Worker] = []
    try:
        # Started here because its own start would unblock SIGINT, see `_without_interrupts`.
        resource_tracker.ensure_running()
        for _ in range(min(processes, len(jobs))):
            workers.append(_Worker(function))
        yield from _run_jobs(jobs, workers, show)
    except BaseException:
        _terminate(workers)
        raise
    finally:
        for worker in workers:
            worker.connection.close()  # a process without a job ends
            worker.process.join()


def _run_jobs(
    jobs: Sequence[tuple[Any, ...]], workers: Sequence["_Worker"], show: Callable[[int, Any], None]
) -> Iterator[tuple[int, Any]]:
    waiting = iter(enumerate(jobs))
    busy: dict[Any, _Worker] = {}
    for worker in workers:
        worker.begin(*next(waiting))
        busy[worker.connection] = worker
    while busy:
        for ready in wait(list(busy)):
            worker = busy[ready]
            number = worker.number
            kind, what = worker.receive()
            if kind == _REPORT:
                show(number, what)
                continue
            if kind == _ERROR:
                raise what
            following = next(waiting, None)
            if following is None:
                del busy[ready]
            else:
                worker.begin(*following)
            yield number, what


def _terminate(workers: Sequence["_Worker"]) -> None:
    """End the processes; those that take too long, or all if another Ctrl-C comes meanwhile, are killed."""
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + END_S
    try:
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            worker.process.kill()


class _Worker:
    """A process with one job at a time; `number` is the job's."""

    def __init__(self, function: Callable[..., Any]):
        context = multiprocessing.get_context("spawn")
        self.number = -1
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end, function, os.getpid()), daemon=True)
        with _without_interrupts():
            self.process.start()
        other_end.close()

    def begin(self, number: int, job: tuple[Any, ...]) -> None:
        self.number = number
        with contextlib.suppress(ConnectionError):  # the process is gone: `receive` says why
            self.connection.send(job)

    def receive(self) -> tuple[str, Any]:
        """A message: its kind, and a report, a result or an error. Raises BenchError if the process is gone."""
        try:
            kind, what = self.connection.recv()
        except (EOFError, ConnectionError):
            raise BenchError(f"a process that simulates {self._end()}") from None
        return kind, what

    def _end(self) -> str:
        self.process.join(END_S)
        code = self.process.exitcode
        if code == -signal.SIGKILL:
            return "was killed, probably for lack of memory: lower --jobs"
        how = f"with exit code {code}" if code is None or code >= 0 else f"by signal {-code}"
        return f"was ended {how}: use --jobs 1 to see why"


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block SIGINT in processes that are started meanwhile, for their whole life.

    A terminal sends it to them as well as to this process. They get SIGTERM from here, and a second signal would end
    them before they have saved what they have measured.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, function: Callable[..., Any], parent: int) -> None:
    """Run jobs from a connection until its other end is closed, or the process that has it ends."""
    end_with_parent(parent)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job = connection.recv()
            try:
                result = function(lambda what: connection.send((_REPORT, what)), *job)
            except BaseException as error:
                connection.send((_ERROR, _portable(error)))
                return
            connection.send((_RESULT, result))


def _portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note, or one with the same text if it can't be sent to another process."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"In a process that simulates:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(text)
    return error
