"""When requests are sent: arrival times that are drawn in advance from a seed, or replayed from a trace."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.errors import BenchError
from bench.workloads.traces import Trace, read_trace

MOST_RATE = 1e6  # requests/s, beyond what any load generator sends
KINDS = ("poisson", "constant", "gamma")  # of drawn arrivals

# Times are rounded to nanoseconds later: keeps the first arrival of a part from being rounded into the part before.
_APART_S = 2e-9


@dataclass(frozen=True, slots=True)
class Arrivals:
    """The distribution of arrival times, or a trace whose arrivals are scaled to the requested rate."""

    kind: str = "poisson"
    burstiness: float = 1.0
    trace: str | None = None
    trace_unit: str = "auto"
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        if self.trace is not None:
            self.read_trace()
        elif self.kind not in KINDS:
            raise BenchError(f"unknown kind of arrivals {self.kind!r}: choose from {', '.join(KINDS)} (--arrivals)")

    def read_trace(self) -> Trace:
        assert self.trace is not None
        return read_trace(self.trace, self.trace_unit, self.skip_bad_rows)

    def schedule(self, rate: float, parts: Sequence[float], seed: int) -> np.ndarray:
        """Sorted send times in seconds from the start; the first one is 0.

        Drawn arrivals are drawn separately for each part, so that each part has exactly rate x length of them. A trace
        is replayed over all parts, and from its beginning again after its end.

        Args:
            rate: requests/s.
            parts: lengths of the parts of the load point (warm-up, window, drain) in seconds.
            seed: of the load point.
        """
        if self.trace is not None:
            return replay(self.read_trace(), rate, sum(parts))
        drawn, start_s = [np.zeros(0)], 0.0
        for part, length_s in enumerate(parts):
            if length_s > 0:
                times = arrival_times(rate, length_s, seed + part, self.kind, self.burstiness)
                drawn.append(start_s + times[times < length_s])
            start_s += length_s + _APART_S
        return np.concatenate(drawn)


def point_seed(seed: int, workload_name: str, rate: float, repeat: int = 0) -> int:
    """The seed of a load point, the same on every machine and for every configuration.

    `repeat` differs between runs of one rate: a confirmation must not hit the cached prefixes of the run it confirms.
    """
    key = f"{seed}|{workload_name}|{rate:.6g}|{repeat}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def arrival_times(
    rate: float, duration_s: float, seed: int, kind: str = "poisson", burstiness: float = 1.0
) -> np.ndarray:
    """Sorted send times in seconds from the start, float64[count]; the first one is 0.

    count = round(rate · duration_s), at least 1. Gaps (including the one after the last arrival) are rescaled to sum to
    count / rate, so that the mean rate is exactly the requested one. `burstiness` is the shape of gamma gaps: 1 is
    Poisson, smaller is burstier.
    """
    if not (rate > 0 and np.isfinite(rate)):
        raise BenchError(f"the request rate must be a positive number, not {rate} (--rate)")
    if not (duration_s > 0 and np.isfinite(duration_s)):
        raise BenchError(f"the duration of a load point must be a positive number of seconds, not {duration_s}")
    if not (burstiness > 0 and np.isfinite(burstiness)):
        raise BenchError(f"burstiness must be a positive number, not {burstiness} (--burstiness)")
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


def replay(trace: Trace, rate: float, length_s: float) -> np.ndarray:
    """The arrivals of a repeated trace before `length_s`, scaled to a mean of `rate`."""
    if not (rate > 0 and np.isfinite(rate)):
        raise BenchError(f"the request rate must be a positive number, not {rate} (--rate)")
    if rate == float(f"{trace.rate:.4g}"):  # load points round their rates; at its own rate a trace is not scaled
        rate = trace.rate
    once = trace.times * (trace.rate / rate)
    period = len(once) / rate
    rounds = int(np.ceil(length_s / period)) or 1
    times = np.concatenate([once + i * period for i in range(rounds)])
    return times[times < max(length_s, 1e-9)]
