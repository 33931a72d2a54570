"""Growth of latencies within a window: detects a growing queue that the number of open requests does not show yet."""

import math
from dataclasses import dataclass

import numpy as np

from bench.statistics.student import STUDENT_T_ONE_SIDED

_PARTS = 8  # parts of the window, by requests
_FEWEST = 3  # requests per part
# Means over parts of a random walk are correlated: their ends deviate by this factor more than independent steps.
_WALK = 1.2


@dataclass(frozen=True, slots=True)
class WindowLatencies:
    """Latencies of the requests of a window, by the time at which they were due, in seconds."""

    due_s: np.ndarray  # float64[n], sorted
    ttft_s: np.ndarray
    latency_s: np.ndarray  # E2E latency scaled to the mean output length, since lengths vary with the workload


@dataclass(frozen=True, slots=True)
class Trend:
    """Growth of a latency in seconds per second, and its noise (95 %, one-sided)."""

    slope: float
    noise: float


def trend(due_s: np.ndarray, latency_s: np.ndarray) -> Trend | None:
    """The trend between the first and the last part of a window; None if it has too few requests.

    The noise is that of a random walk with independent increments between parts, as is the wait in an overloaded queue.
    """
    parts = min(_PARTS, len(due_s) // _FEWEST)
    if parts < 4:
        return None
    places = np.array_split(np.arange(len(due_s)), parts)
    means = np.array([latency_s[part].mean() for part in places])
    length_s = float(due_s[places[-1]].mean() - due_s[places[0]].mean())
    if length_s <= 0:
        return None
    spread = _WALK * float(np.std(np.diff(means), ddof=1)) * math.sqrt(parts - 1)
    noise = STUDENT_T_ONE_SIDED[parts - 2] * spread / length_s
    return Trend(float(means[-1] - means[0]) / length_s, noise)
