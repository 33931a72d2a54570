"""A queue in simulated time."""

import heapq

import numpy as np

from bench.arrivals import arrival_times
from bench.criteria import Flow


def queue(rate: float, slots: int, service_s: float, requests: int, seed: int, warmup: int = 50) -> Flow:
    """Poisson arrivals at a server with `slots` places and a fixed service time; capacity is slots / service_s."""
    arrivals = np.concatenate(
        [arrival_times(rate, warmup / rate, seed), warmup / rate + arrival_times(rate, requests / rate, seed + 1)]
    )
    free = [0.0] * slots
    ends = []
    for at in arrivals:
        end = max(at, heapq.heappop(free)) + service_s
        heapq.heappush(free, end)
        ends.append(end)
    return Flow(arrivals, np.sort(ends), warmup / rate, (warmup + requests) / rate)
