"""Sends the requests of one load point, from one or several generator processes, and returns one recording."""

import math

import numpy as np

from bench.loadgen.job import Job, Observer, Start
from bench.loadgen.loop import Loop
from bench.loadgen.process import generating, run_loop
from bench.loadgen.recording import Recording
from bench.loadgen.request import encode_request, resolve
from bench.loadgen.shards import run_shards
from bench.target.target import Target
from bench.workloads.base import RequestSpec
from engine.host import cores

CHUNKS_PER_CORE = 60_000  # per second; they take about two thirds of a core


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
    """Send specs[i] at times[i], whatever the server does, until all responses have ended.

    Failures of requests are recorded, not raised. Requests that are open when the load ends early are "cut short".

    Args:
        target: the server.
        specs: the requests.
        times: float64[len(specs)], send times in seconds, sorted.
        observer: called during the load; may end it.
        time_limit_s: limit of the load, from time 0.
        needed: end once this many first requests have ended; later ones only keep up the load. None: all.
        processes: number of generator processes; None: from the expected chunks per second.

    Raises BenchError if the host is not found or a generator process fails.
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
    """Keep `concurrency` requests open until all specs are done: as soon as one ends, the next one is sent.

    The intended time of a request is the moment at which the generator could send it. Its lateness counts from the
    arrival of the end of the previous response. Several processes divide requests and concurrency among them. Ends
    early as run_load() does.
    """
    if concurrency < 1:
        raise ValueError(f"a concurrency of {concurrency}")
    return _run(target, specs, [], time_limit_s, len(specs), concurrency, observer, min(processes, concurrency))


def processes_for(chunks_per_s: float) -> int:
    """The number of generator processes for an expected rate of chunks, at most the number of cores."""
    return max(1, min(cores(), math.ceil(chunks_per_s / CHUNKS_PER_CORE)))


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
        return run_shards(job, specs, processes, observer, target=target)
    with generating(len(specs)):
        loop = Loop(job, observer, Start.soon(job.lead_ns))
        use = run_loop(loop)
    return Recording(loop.streams, specs, loop.start_ns, use, cut_short=loop.cut_short)
