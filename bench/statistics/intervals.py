"""Percentiles and their 95 % intervals for clustered samples: all requests of an engine step share its gap.

The interval is that of order statistics for the effective number of independent samples (Korn and Graubard's method for
surveys with clusters). The variance of the share of samples above the percentile is estimated from sums over stretches
of consecutive steps. This takes into account that slow steps follow each other, as during a chunked prefill.
"""

import bisect
import math
from collections.abc import Sequence

import numpy as np

_NORMAL_FROM = 20_000  # from this number of samples on, the binomial distribution is approximated by the normal one
_Z95 = 1.959964
_STRETCH = 1.5  # length of a stretch in steps, as a multiple of the square root of the number of steps


def percentile(samples: np.ndarray, q: float) -> float:
    """The q-th percentile (0..100); NaN without samples."""
    return float(np.percentile(samples, q)) if len(samples) else math.nan


def percentile_interval(samples: np.ndarray, q: float, steps: np.ndarray | None = None) -> tuple[float, float]:
    """95 % interval of the q-th percentile, without assumptions about the distribution.

    Args:
        samples: float64[n], in order of time.
        q: 0..100.
        steps: int[n], the engine step of each sample; None: all samples are independent.

    An end that the data do not determine is infinite: the P99 of fewer than 367 independent samples has no upper end.
    """
    if len(samples) == 0:
        return math.nan, math.nan
    share = q / 100
    count = effective_samples(samples, share, steps)
    low, high = _ranks(count, share)
    ordered = np.sort(samples)
    return _order_statistic(ordered, low, count), _order_statistic(ordered, high, count)


def effective_samples(samples: np.ndarray, share: float, steps: np.ndarray | None = None) -> int:
    """The number of independent samples that would give the quantile at `share` (0..1) with the same precision."""
    above = samples > np.quantile(samples, share)
    if steps is None:
        excess = above - above.mean()
        groups = len(samples)
    else:
        _, places = np.unique(steps, return_inverse=True)
        groups = int(places.max()) + 1
        sizes = np.bincount(places, minlength=groups)
        excess = np.bincount(places, weights=above, minlength=groups) - above.mean() * sizes
    if groups < 2 or not above.any():
        return groups
    stretch = min(max(1, round(_STRETCH * math.sqrt(groups))), groups // 2)
    sums = np.concatenate(([0.0], np.cumsum(excess)))
    within = float(np.square(sums[stretch:] - sums[:-stretch]).mean()) * groups / stretch * groups / (groups - stretch)
    # If stretches vary less than single steps do, that is chance.
    variance = max(within, float(np.square(excess).sum())) / len(samples) ** 2
    spread = float(above.mean() * (1 - above.mean()))
    # The variance is itself an estimate from overlapping stretches, hence Student's t instead of the normal.
    doubt = (_student_t(1.5 * groups / stretch) / _Z95) ** 2
    return max(1, min(groups, round(spread / (variance * doubt))))


def step_indices(starts_s: np.ndarray, ends_s: np.ndarray) -> np.ndarray:
    """Number the engine steps behind gaps between chunks: int64[n], from 0.

    Args:
        starts_s, ends_s: float64[n], arrivals of the chunk before each gap and of the one after it.

    Chunks of one step arrive at slightly different times. Gaps of one stream belong to different steps, and gaps of one
    step overlap. A step therefore begins with the earliest end among the gaps that start after the previous step began.

    Example: streams a and b get chunks at a: 0, 10, 21 and b: 0, 11, 20. The gaps end at a: 10, 21 and b: 11, 20. The
    first step begins at 10. Gaps that start from 10 on end at 21 and 20, so the second step begins at 20. The gaps
    belong to steps a: 0, 1 and b: 0, 1.
    """
    real = ends_s > starts_s  # chunks in one read share a timestamp: there is no step between them
    if not real.any():
        return np.zeros(len(ends_s), dtype=np.int64)
    first_s, last_s = (starts_s, ends_s) if real.all() else (starts_s[real], ends_s[real])
    order = np.argsort(first_s, kind="stable")
    starts = first_s[order].data  # searched like a list, without an object for each of millions of gaps
    earliest = np.minimum.accumulate(last_s[order][::-1])[::-1].data
    begins: list[float] = []
    place = 0
    while place < len(starts):
        begins.append(earliest[place])
        place = bisect.bisect_left(starts, begins[-1], lo=place)
    return np.maximum(np.searchsorted(np.array(begins), ends_s, "right") - 1, 0)


def joined_gaps(first_s: Sequence[float], gaps_s: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Gaps of all streams in order of arrival, as (gaps in seconds, step of each gap).

    Args:
        first_s: arrival of each stream's first chunk.
        gaps_s: the gaps of each stream.
    """
    count = sum(len(gaps) for gaps in gaps_s)
    if not count:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    starts, ends, place = np.empty(count), np.empty(count), 0
    for first, gaps in zip(first_s, gaps_s, strict=True):
        if not len(gaps):
            continue
        own = slice(place, place := place + len(gaps))
        ends[own] = first + np.cumsum(gaps)
        starts[own.start] = first
        starts[own.start + 1 : own.stop] = ends[own.start : own.stop - 1]
    steps = step_indices(starts, ends)
    order = np.argsort(ends, kind="stable")
    return np.concatenate(gaps_s)[order], steps[order]


def _ranks(n: int, share: float) -> tuple[float, float]:
    """Ranks (from 1, fractional) of the order statistics around the quantile; infinite if there are none.

    The number of samples below the quantile is binomial; its distribution is interpolated between integer ranks.
    """
    if n >= _NORMAL_FROM:
        spread = _Z95 * math.sqrt(n * share * (1 - share))
        return n * share - spread, n * share + spread + 1
    k = np.arange(n + 1)
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    log_ways = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    below = np.cumsum(np.exp(log_ways + k * math.log(share) + (n - k) * math.log1p(-share)))
    low = 1 + float(np.interp(0.025, below, k)) if below[0] <= 0.025 else -math.inf
    high = 1 + float(np.interp(0.975, below, k)) if below[n - 1] >= 0.975 else math.inf
    return low, high


def _order_statistic(ordered: np.ndarray, rank: float, count: int) -> float:
    """The value at a rank among `count` independent samples, interpolated from the sorted samples."""
    if not math.isfinite(rank):
        return rank
    place = rank / (count + 1) * len(ordered) - 0.5
    return float(np.interp(place, np.arange(len(ordered)), ordered))


def _student_t(freedom: float) -> float:
    """The two-sided 95 % quantile of Student's t (Cornish-Fisher expansion, error 1 % at 3 degrees of freedom)."""
    z = _Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
