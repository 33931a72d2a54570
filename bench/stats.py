"""Percentiles with intervals, and the columns of a load point that are reduced from its requests."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.results import RequestRow

_NORMAL_FROM = 20_000  # samples from which the binomial distribution is taken as normal
_Z95 = 1.959964


def percentile(samples: np.ndarray, q: float) -> float:
    """The q-th percentile (0..100); not a number without samples."""
    return float(np.percentile(samples, q)) if len(samples) else math.nan


def percentile_interval(samples: np.ndarray, q: float) -> tuple[float, float]:
    """95 % interval of the q-th percentile, from order statistics: no shape of the distribution is assumed.

    Samples count as independent. The high end is the largest sample where too few lie beyond it, so it is then a
    lower bound of the true end.
    """
    n = len(samples)
    if n == 0:
        return math.nan, math.nan
    ordered = np.sort(samples)
    low, high = _ranks(n, q / 100)
    return float(ordered[low]), float(ordered[high])


def _ranks(n: int, share: float) -> tuple[int, int]:
    """Indices (from 0) of the order statistics around the quantile: the number of samples below it is binomial."""
    if n >= _NORMAL_FROM:
        spread = _Z95 * math.sqrt(n * share * (1 - share))
        low, high = math.floor(n * share - spread) - 1, math.ceil(n * share + spread)
    else:
        k = np.arange(n + 1)
        log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
        log_ways = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
        below = np.cumsum(np.exp(log_ways + k * math.log(share) + (n - k) * math.log1p(-share)))
        low = int(np.searchsorted(below, 0.025)) - 1
        high = int(np.searchsorted(below, 0.975))
    return min(max(low, 0), n - 1), min(max(high, 0), n - 1)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Samples in ms over the requests of a window."""

    ttft: np.ndarray
    itl: np.ndarray  # all gaps between chunks of all requests, pooled
    tpot: np.ndarray
    e2e: np.ndarray
    tokens_per_chunk: float
    cut_short: int


def latencies(rows: Sequence[RequestRow], end_s: float) -> Latencies:
    """Samples of the requests in the window; one still open at `end_s` counts with what it had waited by then."""
    ttft: list[float] = []
    itl: list[np.ndarray] = []
    tpot: list[float] = []
    e2e: list[float] = []
    tokens, chunks, cut_short = 0, 0, 0
    for row in rows:
        if not row.in_window or row.status not in ("ok", "cut short"):
            continue
        waited = max(0.0, end_s - row.intended_s)
        cut_short += row.status != "ok"
        ttft.append(waited if row.ttft_s is None else row.ttft_s)
        e2e.append(waited if row.e2e_s is None else row.e2e_s)
        itl.append(np.asarray(row.chunk_gaps_s, dtype=np.float64))
        tokens += sum(row.chunk_tokens)
        chunks += len(row.chunk_tokens)
        later = sum(row.chunk_tokens[1:])
        if row.status == "ok" and later:
            # To the last chunk, not to the end of the stream: the usage record that follows is not a token.
            tpot.append(sum(row.chunk_gaps_s) / later)
    return Latencies(
        ttft=_ms(ttft),
        itl=np.concatenate(itl) * 1e3 if itl else np.zeros(0),
        tpot=_ms(tpot),
        e2e=_ms(e2e),
        tokens_per_chunk=tokens / chunks if chunks else 1.0,
        cut_short=cut_short,
    )


def token_rates(rows: Sequence[RequestRow], start_s: float, end_s: float) -> tuple[float, float]:
    """Input and output tokens/s inside the window, of all requests: prompts by their first token, tokens by arrival."""
    inputs, outputs = 0, 0
    for row in rows:
        if row.ttft_s is None or not row.chunk_tokens:
            continue
        first = row.intended_s + row.ttft_s
        inputs += row.input_tokens if start_s <= first < end_s else 0
        arrivals = first + np.concatenate(([0.0], np.cumsum(row.chunk_gaps_s)))
        counted = np.asarray(row.chunk_tokens[: len(arrivals)])
        arrivals = arrivals[: len(counted)]
        outputs += int(counted[(arrivals >= start_s) & (arrivals < end_s)].sum())
    window = max(end_s - start_s, 1e-9)
    return inputs / window, outputs / window


def goodput(rows: Sequence[RequestRow], limits: Mapping[str, float], window_s: float) -> float | None:
    """Requests/s of the window that met every limit (column of PointRow -> ms); None without limits.

    A limit counts for each request by itself: its TTFT, TPOT and E2E latency, and the limit's percentile of its gaps.
    """
    if not limits:
        return None
    good = sum(row.in_window and row.status == "ok" and _meets(row, limits) for row in rows)
    return good / window_s if window_s > 0 else 0.0


def _meets(row: RequestRow, limits: Mapping[str, float]) -> bool:
    for column, allowed_ms in limits.items():
        metric, q = re.fullmatch(r"(\w+)_p(\d+)_ms", column).groups()  # type: ignore[union-attr]
        if metric == "ttft":
            seen = row.ttft_s
        elif metric == "e2e":
            seen = row.e2e_s
        elif len(row.chunk_tokens) < 2:
            continue  # a single chunk has no gaps
        elif metric == "tpot":
            seen = sum(row.chunk_gaps_s) / max(1, sum(row.chunk_tokens[1:]))
        else:
            seen = percentile(np.asarray(row.chunk_gaps_s), float(q))
        if seen is None or seen * 1e3 > allowed_ms:
            return False
    return True


def _ms(seconds: list[float]) -> np.ndarray:
    return np.asarray(seconds, dtype=np.float64) * 1e3
