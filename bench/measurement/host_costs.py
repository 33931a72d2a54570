"""What a server's processes and the load generator cost on cores that they share with the device: closed loops of short
requests, whose steps are compared with the device's own times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from bench.errors import BenchError
from bench.loadgen import run_closed_loop, run_load
from bench.results import RequestRecord
from bench.target import Target
from bench.workloads import Workload, make_workload
from bench.workloads.arrivals import point_seed

INPUT, OUTPUT = 16, 80
SETTLED = 32  # tokens of a request after which all requests decode
CONTEXT = INPUT + (SETTLED + OUTPUT) // 2  # of the decodes between these, in the middle
FIRST_TOKENS = 12  # requests in turn whose first token is timed
STREAMS, STREAM_OUTPUT = 4, 280  # requests that decode while others arrive
ARRIVING, ARRIVE_S = 16, (0.3, 2.0)  # requests of one token, and when they arrive
LIMIT_S = 120.0
_EVER = (-1.0, float("inf"))


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Requests that came while others decoded. requests: seconds after the first, and output tokens, of all of them.

    first_token: the median time of those of one token.
    """

    requests: tuple[tuple[float, int], ...]
    first_token: float


@dataclass(frozen=True, slots=True)
class HostTimes:
    """Seconds beside those of the device.

    steps: of a step, by the number of its requests. first_token: of a request that comes alone, from its sending to its
    first token.
    """

    steps: dict[int, float]
    first_token: float
    arrivals: tuple[Arrivals, ...]


class _Failed:
    """Ends a load at the first request that fails."""

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:  # noqa: ARG002
        return not failed


def measure_host(
    target: Target,
    vocabulary: int,
    device: Callable[[int], float],
    prompt: Callable[[], float],
    concurrencies: Sequence[int],
    rounds: int,
    show: Callable[[int], None],
) -> HostTimes:
    """Times over rounds, in which the server and the device by itself are measured in turn.

    Disturbances only add time, to either of the two, so that the lower quartiles of both are compared.

    Args:
        target: a server that runs no other requests.
        vocabulary: ids of prompts are below it.
        device: seconds of the device for a step in which so many requests decode after CONTEXT tokens, measured now.
        prompt: the same for a step that computes a prompt of INPUT tokens, and nothing else.
        show: called with the rounds that are done.

    Raises BenchError if a request fails.
    """
    gaps: dict[int, list[float]] = {count: [] for count in concurrencies}
    alone: dict[int, list[float]] = {count: [] for count in concurrencies}
    first_tokens, prompts, arrivals = [], [], []
    for done in range(rounds):
        for count in concurrencies:
            gaps[count].append(median(map(_gap, _load(target, vocabulary, count, count, OUTPUT, done))))
            alone[count].append(device(count))
        records = _load(target, vocabulary, 1, FIRST_TOKENS, 1, done)
        first_tokens.append(median(record.ttft_s or 0.0 for record in records))
        prompts.append(prompt())
        arrivals.append(_arrivals(target, vocabulary, done))
        show(done + 1)
    steps = {count: _low(gaps[count]) - _low(alone[count]) for count in concurrencies}
    return HostTimes(steps, _low(first_tokens) - _low(prompts), tuple(arrivals))


def _low(values: Sequence[float]) -> float:
    """The lower quartile."""
    return float(np.quantile(values, 0.25))


def _arrivals(target: Target, vocabulary: int, seed: int) -> Arrivals:
    """Some streams at once, then requests of one token at random times."""
    random = np.random.default_rng(seed)
    times = np.concatenate((np.zeros(STREAMS), np.sort(random.uniform(*ARRIVE_S, ARRIVING))))
    outputs = [STREAM_OUTPUT] * STREAMS + [1] * ARRIVING
    prompts = _workload(vocabulary, 1).requests(len(outputs), point_seed(seed, "arrivals", float(len(outputs))))
    specs = [replace(prompt, output_tokens=output) for prompt, output in zip(prompts, outputs, strict=True)]
    recording = run_load(target, specs, times, observer=_Failed(), time_limit_s=LIMIT_S)
    records = recording.records(_EVER)
    _check(records)
    late = [record.ttft_s or 0.0 for record in records if record.asked_output_tokens == 1]
    return Arrivals(tuple(zip(times.tolist(), outputs, strict=True)), median(late))


def _load(
    target: Target, vocabulary: int, concurrency: int, requests: int, output: int, seed: int
) -> list[RequestRecord]:
    workload = _workload(vocabulary, output)
    specs = workload.requests(requests, point_seed(seed, workload.name, float(concurrency)))
    recording = run_closed_loop(target, specs, concurrency, observer=_Failed(), time_limit_s=LIMIT_S)
    records = recording.records(_EVER)
    _check(records)
    return records


def _workload(vocabulary: int, output: int) -> Workload:
    return make_workload({"kind": "random", "input": INPUT, "output": output}, vocabulary)


def _check(records: Sequence[RequestRecord]) -> None:
    """Raise BenchError for a request that failed."""
    for record in records:
        if record.status != "ok" or record.output_tokens != record.asked_output_tokens:
            raise BenchError(f"a request of the profile failed: {record.status} {record.error}".strip())


def _gap(record: RequestRecord) -> float:
    """Seconds of a token once all requests decode; tokens that arrive in one chunk share its time."""
    before, tokens, seconds = record.chunk_tokens[0], 0, 0.0
    for gap, count in zip(record.chunk_gaps_s, record.chunk_tokens[1:], strict=True):
        if before >= SETTLED:
            tokens, seconds = tokens + count, seconds + gap
        before += count
    if not tokens:
        raise BenchError(f"a response of {record.output_tokens} tokens came in chunks that are too large to be timed")
    return seconds / tokens
