"""Loads on a server whose processes share the cores of its device, to which their costs are fitted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.errors import BenchError
from bench.loadgen import run_closed_loop, run_load
from bench.results import RequestRecord
from bench.target import Target
from bench.workloads import make_workload
from bench.workloads.arrivals import point_seed

INPUT, OUTPUT = 48, 64
ARRIVE_S = 5.0  # during which requests of a load arrive
FEWEST = 4  # requests of a load
WARM_UP = 4  # requests at once before the first load
LIMIT_S = 120.0
_EVER = (-1.0, float("inf"))


@dataclass(frozen=True, slots=True)
class ServedLoad:
    """What a client measured of each request of a load.

    at: seconds after the start of the load. first_token: seconds from sending a request to its first token. per_token:
    seconds of each later one.
    """

    at: tuple[float, ...]
    first_token: tuple[float, ...]
    per_token: tuple[float, ...]


class _Failed:
    """Ends a load at the first request that fails."""

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:  # noqa: ARG002
        return not failed


def measure_loads(
    target: Target,
    vocabulary: int,
    rates: Sequence[float],
    rounds: int,
    speed: Callable[[], float],
    show: Callable[[int], None],
) -> list[ServedLoad]:
    """Loads of INPUT and OUTPUT tokens at each rate, in rounds, so that a disturbance hits all rates alike.

    Args:
        target: a server that runs no other requests.
        vocabulary: ids of prompts are below it.
        rates: requests/s.
        speed: of the device now, 1 as it was described; latencies are multiplied with it.
        show: called with the rounds that are done.

    Raises BenchError if a request fails.
    """
    workload = make_workload({"kind": "random", "input": INPUT, "output": OUTPUT}, vocabulary)
    warm_up = workload.requests(WARM_UP, point_seed(0, "warm-up", 0.0))
    recording = run_closed_loop(target, warm_up, WARM_UP, observer=_Failed(), time_limit_s=LIMIT_S)
    _check(recording.records(_EVER))
    loads: list[ServedLoad] = []
    for done in range(rounds):
        for rate in rates:
            now = speed()
            seed = point_seed(done, workload.name, rate)
            times = np.sort(np.random.default_rng(seed).uniform(0, ARRIVE_S, max(round(rate * ARRIVE_S), FEWEST)))
            specs = workload.requests(len(times), seed)
            recording = run_load(target, specs, times, observer=_Failed(), time_limit_s=LIMIT_S)
            records = recording.records(_EVER)
            _check(records)
            loads.append(_served(times, records, now))
        show(done + 1)
    return loads


def _served(times: np.ndarray, records: Sequence[RequestRecord], speed: float) -> ServedLoad:
    return ServedLoad(
        tuple(times.tolist()),
        tuple((record.ttft_s or 0.0) * speed for record in records),
        tuple(record.decode_s / record.later_tokens * speed for record in records),
    )


def _check(records: Sequence[RequestRecord]) -> None:
    """Raise BenchError for a request that failed."""
    for record in sorted(records, key=lambda one: one.status == "cut short"):  # which others are by the first failure
        if record.status != "ok" or record.output_tokens != record.asked_output_tokens:
            raise BenchError(f"a request of the profile failed: {record.status} {record.error}".strip())
