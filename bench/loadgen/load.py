"""Sends the requests of one load point, from one or several generator processes, and returns one recording."""

import math
from collections.abc import Callable

import numpy as np

from bench.errors import BenchError
from bench.loadgen.job import LEAD_NS, Job, Observer, Running, Start
from bench.loadgen.process import OTHER_FILES, run_here
from bench.loadgen.recording import Load, Recording
from bench.loadgen.request import encode_request, resolve
from bench.loadgen.shards import run_shards
from bench.target.target import Target
from bench.workloads.base import RequestSpec
from engine.host import allow_open_files, cores

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
    job = open_job(target, specs, times, time_limit_s, needed)
    if processes is None:
        processes = processes_for(expected_chunks_per_s(specs, times))
    return _run(job, specs, processes, observer, target)


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
    job = closed_job(target, specs, concurrency, time_limit_s)
    return _run(job, specs, min(processes, concurrency), observer, target)


def open_job(
    target: Target, specs: list[RequestSpec], times: np.ndarray, time_limit_s: float, needed: int | None
) -> Job:
    """The job of `run_load`."""
    if len(specs) != len(times):
        raise ValueError(f"{len(specs)} requests for {len(times)} arrival times")
    offsets = np.round(np.asarray(times, dtype=np.float64) * 1e9).astype(np.int64).tolist()
    return _job(target, specs, offsets, time_limit_s, len(specs) if needed is None else needed)


def closed_job(target: Target, specs: list[RequestSpec], concurrency: int, time_limit_s: float) -> Job:
    """The job of `run_closed_loop`."""
    if concurrency < 1:
        raise ValueError(f"a concurrency of {concurrency}")
    return _job(target, specs, [], time_limit_s, len(specs), concurrency)


def processes_for(chunks_per_s: float) -> int:
    """The number of generator processes for an expected rate of chunks, at most the number of cores."""
    return max(1, min(cores(), math.ceil(chunks_per_s / CHUNKS_PER_CORE)))


def expected_chunks_per_s(specs: list[RequestSpec], times: np.ndarray) -> float:
    """The chunks per second of an open loop if each token is a chunk and the server keeps up."""
    span_s = max(1.0, float(times[-1] - times[0])) if len(times) else 1.0
    return sum(spec.output_tokens for spec in specs) / span_s


def run_job(
    job: Job,
    processes: int,
    observer: Observer,
    target: Target,
    begin: Callable[[], Start] | None = None,
    attach: Callable[[Running], None] | None = None,
) -> Load:
    """Run a job on this host, on several processes if it has enough requests for them.

    `begin` and `attach` are as of `run_here`; without `begin` the load starts as soon as it can. Raises BenchError if
    a closed loop needs more open files than a process may have.
    """
    if job.concurrency is not None:
        _check_open_files(job.most_open, processes)
    if processes > 1 and len(job.payloads) >= processes:
        begin = begin or (lambda: Start.soon(max(LEAD_NS, job.lead_ns)))
        return run_shards(job, processes, observer, begin, attach, target=target)
    return run_here(job, observer, begin or (lambda: Start.soon(job.lead_ns)), attach)


def _check_open_files(streams: int, processes: int) -> None:
    wanted = math.ceil(streams / processes) + OTHER_FILES
    allowed = allow_open_files(wanted)
    if allowed < wanted:
        raise BenchError(
            f"{streams} streams need {wanted} open files in a process, and {allowed} are allowed: raise the limit "
            f"(`ulimit -n {wanted}`), lower --concurrency, or use more generators (--generators)"
        )


def _job(
    target: Target,
    specs: list[RequestSpec],
    offsets_ns: list[int],
    time_limit_s: float,
    needed: int,
    concurrency: int | None = None,
) -> Job:
    address = resolve(target)
    payloads = [encode_request(target, address, spec) for spec in specs]
    return Job(address, payloads, offsets_ns, time_limit_s, needed, concurrency)


def _run(job: Job, specs: list[RequestSpec], processes: int, observer: Observer, target: Target) -> Recording:
    load = run_job(job, processes, observer, target)
    return Recording(load.streams, specs, load.start_ns, load.use, cut_short=load.cut_short)
