"""One load point's requests, sent by as many generator processes as their answers need, with one record."""

import contextlib
import gc
import math
import time
from collections.abc import Iterator

import numpy as np

from bench.loadgen.loop import Job, Loop, Observer, Start
from bench.loadgen.recording import GeneratorUse, Recording
from bench.loadgen.target import Target, encode_request, resolve
from bench.workloads.base import RequestSpec
from engine.host import cores

CHUNKS_A_CORE = 60_000  # a second; one process spends about two thirds of a core on them


def run_load(
    target: Target,
    specs: list[RequestSpec],
    times: np.ndarray,
    *,
    observer: Observer,
    time_limit_s: float,
    needed: int | None = None,
    processes: int | None = None,
) -> Recording:
    """Send specs[i] at times[i] (seconds, sorted) whatever the server does, until all answers ended.

    Ends early when the observer says so or `time_limit_s` after time 0: what is open then is "cut short", what is not
    sent stays so. With `needed` it also ends once that many first requests ended: those after them only keep up the
    load meanwhile. `processes` (None: from the expected chunks a second) share the requests in turn. Failures of
    requests are recorded; BenchError only when the host can't be found.
    """
    if len(specs) != len(times):
        raise ValueError(f"{len(specs)} requests for {len(times)} arrival times")
    if processes is None:
        span_s = max(1.0, float(times[-1] - times[0])) if len(times) else 1.0
        processes = processes_for(sum(spec.output_tokens for spec in specs) / span_s)
    offsets = np.round(np.asarray(times, dtype=np.float64) * 1e9).astype(np.int64).tolist()
    awaited = len(specs) if needed is None else needed
    return _run(target, specs, offsets, time_limit_s, awaited, None, observer, processes)


def run_closed_loop(
    target: Target,
    specs: list[RequestSpec],
    concurrency: int,
    *,
    observer: Observer,
    time_limit_s: float,
    processes: int = 1,
) -> Recording:
    """Keep `concurrency` requests open until all specs were sent and answered: as soon as one ends, the next is sent.

    There is no schedule that a request could miss: its intended time is when its turn came in the generator, and
    lateness is counted from the arrival of the end of the answer before it. Several processes share both the requests
    and the concurrency. Ends early as run_load() does.
    """
    if concurrency < 1:
        raise ValueError(f"a concurrency of {concurrency}")
    return _run(target, specs, [], time_limit_s, len(specs), concurrency, observer, min(processes, concurrency))


def processes_for(chunks_per_s: float) -> int:
    """Generator processes for an expected rate of chunks, as far as there are cores for them."""
    return max(1, min(cores(), math.ceil(chunks_per_s / CHUNKS_A_CORE)))


def _run(
    target: Target,
    specs: list[RequestSpec],
    offsets_ns: list[int],
    time_limit_s: float,
    needed: int,
    concurrency: int | None,
    observer: Observer,
    processes: int,
) -> Recording:
    address = resolve(target)
    payloads = [encode_request(target, address, spec) for spec in specs]
    job = Job(address, payloads, offsets_ns, time_limit_s, needed, concurrency)
    if processes > 1 and len(specs) >= processes:
        from bench.loadgen.shards import run_shards

        return run_shards(job, specs, processes, observer, target=target)
    with generating(len(specs)):
        loop = Loop(job, observer, Start.soon(job.lead_ns))
        use = run_loop(loop)
    return Recording(loop.streams, specs, loop.start_ns, use, cut_short=loop.cut_short)


def run_loop(loop: Loop) -> GeneratorUse:
    """Run one loop to its end, and say what it used of its core."""
    used, waited, began = time.thread_time_ns(), _queued_ns(), time.monotonic_ns()
    try:
        loop.run()
    finally:
        loop.close()
    used, waited, wall = time.thread_time_ns() - used, _queued_ns() - waited, time.monotonic_ns() - began
    # A share of less than a second says nothing.
    length = max(1_000_000_000, wall)
    return GeneratorUse(cpu_s=used / 1e9, cpu_share=used / length, starved_share=waited / length)


@contextlib.contextmanager
def generating(requests: int) -> Iterator[None]:
    """What a loop needs of its process: files for its connections, and no garbage collection.

    A full pass of the collector over the records would be seen as a stall of the server.
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
    """Nanoseconds for which this thread was ready to run and another one had its core; 0 where the system won't say."""
    try:
        with open("/proc/thread-self/schedstat") as f:
            return int(f.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0


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
