"""One generator process: runs a loop without interruptions of its own, and measures its CPU use."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator

from bench.loadgen.job import Job, Observer, Running, Start
from bench.loadgen.loop import Loop
from bench.loadgen.recording import GeneratorUse, Load
from engine.host import allow_open_files

OTHER_FILES = 320  # open beside the connections of a load, at most


def run_here(
    job: Job, observer: Observer, begin: Callable[[], Start], attach: Callable[[Running], None] | None = None
) -> Load:
    """Run a job in this process.

    Args:
        job: what is sent.
        observer: called during the load; may end it.
        begin: called once the process is prepared; returns time 0.
        attach: called with the load before it runs, for an observer that controls it.
    """
    with generating(job.most_open):
        loop = Loop(job, observer, begin())
        if attach is not None:
            attach(loop)
        use = run_loop(loop)
    return Load(loop.streams, loop.start_ns, use, loop.cut_short)


def run_loop(loop: Loop) -> GeneratorUse:
    """Run one loop to its end; returns its CPU use."""
    used, waited, began = time.thread_time_ns(), _queued_ns(), time.monotonic_ns()
    try:
        loop.run()
    finally:
        loop.close()
    used, waited, wall = time.thread_time_ns() - used, _queued_ns() - waited, time.monotonic_ns() - began
    length = max(1_000_000_000, wall)  # shares of shorter times are not meaningful
    return GeneratorUse(cpu_s=used / 1e9, cpu_share=used / length, starved_share=waited / length)


@contextlib.contextmanager
def generating(most_open: int) -> Iterator[None]:
    """Prepare the process for a loop: enough file descriptors, and no garbage collection.

    A full collection over the recorded streams would look like a stall of the server.
    """
    allow_open_files(most_open + OTHER_FILES)
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


def _queued_ns() -> int:
    """Nanoseconds for which this thread was ready to run while others had its core; 0 if that is not known."""
    try:
        with open("/proc/thread-self/schedstat") as f:
            return int(f.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
