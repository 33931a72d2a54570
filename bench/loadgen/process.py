"""One generator process: runs a loop without interruptions of its own, and measures its CPU use."""

import contextlib
import gc
import time
from collections.abc import Iterator

from bench.loadgen.loop import Loop
from bench.loadgen.recording import GeneratorUse


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
def generating(requests: int) -> Iterator[None]:
    """Prepare the process for a loop: enough file descriptors, and no garbage collection.

    A full collection over the recorded streams would look like a stall of the server.
    """
    _allow_descriptors(requests + 64)
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


def _allow_descriptors(count: int) -> None:
    """Raise the soft limit of open files as far as needed and allowed."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256 if hard == resource.RLIM_INFINITY else min(count + 256, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
