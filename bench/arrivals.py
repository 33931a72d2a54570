"""When requests are sent: arrival times drawn ahead from a seed."""

import hashlib

import numpy as np

from bench.errors import BenchError

KINDS = ("poisson", "constant", "gamma")


def point_seed(seed: int, workload_name: str, rate: float, repeat: int = 0) -> int:
    """The seed of a load point, the same on every machine and for every configuration.

    `repeat` tells runs of one rate apart (a confirmation must not re-hit the prefixes of the run it confirms).
    """
    key = f"{seed}|{workload_name}|{rate:.6g}|{repeat}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def arrival_times(
    rate: float, duration_s: float, seed: int, kind: str = "poisson", burstiness: float = 1.0
) -> np.ndarray:
    """Sorted send times in seconds from the start, float64[count], the first one 0.

    count = round(rate · duration_s), at least 1. Gaps (the one after the last arrival included) are rescaled to sum
    to count / rate, so that the mean rate is the asked one and not one drawn around it.
    `burstiness` is the shape of gamma gaps: 1 is Poisson, smaller is burstier.
    """
    if not (rate > 0 and np.isfinite(rate)):
        raise BenchError(f"the request rate must be a positive number, not {rate} (--rate)")
    if not (duration_s > 0 and np.isfinite(duration_s)):
        raise BenchError(f"the duration of a load point must be a positive number of seconds, not {duration_s}")
    if not (burstiness > 0 and np.isfinite(burstiness)):
        raise BenchError(f"burstiness must be a positive number, not {burstiness}")
    count = max(1, round(rate * duration_s))
    rng = np.random.default_rng(seed)
    if kind == "poisson":
        gaps = rng.exponential(size=count)
    elif kind == "constant":
        gaps = np.ones(count)
    elif kind == "gamma":
        gaps = rng.gamma(burstiness, 1 / burstiness, size=count)
    else:
        raise BenchError(f"unknown kind of arrivals {kind!r}: choose from {', '.join(KINDS)}")
    total = float(gaps.sum())
    if total <= 0:  # a very small shape underflows to gaps of 0
        raise BenchError(f"burstiness {burstiness} is too small to draw arrivals from; use a larger one")
    times = np.concatenate(([0.0], np.cumsum(gaps)[:-1])) * (count / rate / total)
    return np.maximum.accumulate(times)
