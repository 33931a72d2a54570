"""Runs simulations in several processes: one uses a single core, and its results don't depend on the others."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
Report = Callable[[Any], None]

_POLL_S = 0.1
_reports: "SimpleQueue[tuple[int, Any]] | None" = None  # of a process of the pool


def run_all(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], processes: int, show: Callable[[int, Any], None]
) -> Iterator[tuple[int, Result]]:
    """Call `function(report, *job)` for each job; yields the number of the job and the result, as they end.

    With one process, or for one job, everything runs in this process. On Ctrl-C the jobs in progress end as the
    function ends them, and KeyboardInterrupt is raised.

    Args:
        function: of a module, since it runs in other processes. It may pass anything that can be pickled to `report`.
        jobs: arguments of the calls, which begin in this order.
        processes: at most.
        show: called here with the number of the job and what it reported.
    """
    if processes == 1 or len(jobs) == 1:
        for number, job in enumerate(jobs):
            yield number, function(lambda what, number=number: show(number, what), *job)
        return
    context = multiprocessing.get_context("spawn")
    reports: SimpleQueue[tuple[int, Any]] = context.SimpleQueue()

    def drain() -> None:
        while not reports.empty():
            show(*reports.get())

    pool = ProcessPoolExecutor(min(processes, len(jobs)), context, _begin, (reports,))
    try:
        numbers = {pool.submit(_call, function, number, job): number for number, job in enumerate(jobs)}
        open_jobs: set[Future[Result]] = set(numbers)
        while open_jobs:
            done, open_jobs = wait(open_jobs, _POLL_S, FIRST_COMPLETED)
            drain()
            for one in sorted(done, key=numbers.__getitem__):
                yield numbers[one], one.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()  # SIGTERM: they keep what they have measured
        raise
    finally:
        pool.shutdown(wait=True)
        with contextlib.suppress(OSError):
            drain()


def _begin(reports: "SimpleQueue[tuple[int, Any]]") -> None:
    global _reports
    _reports = reports


def _call(function: Callable[..., Result], number: int, job: tuple[Any, ...]) -> Result:
    reports = _reports
    assert reports is not None
    return function(lambda what: reports.put((number, what)), *job)
