"""Latency samples, token rates and goodput of a load point, from its requests."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.results import RequestRecord
from bench.statistics.intervals import joined_gaps, percentile


@dataclass(frozen=True, slots=True)
class Latencies:
    """Samples in ms over the requests of a window."""

    ttft: np.ndarray
    itl: np.ndarray  # all gaps between chunks of all requests, in order of arrival
    itl_steps: np.ndarray  # int64, the engine step of each gap
    tpot: np.ndarray
    e2e: np.ndarray
    tokens_per_chunk: float
    cut_short: int


def latencies(records: Sequence[RequestRecord], end_s: float) -> Latencies:
    """Samples of the requests in the window; one that is open at `end_s` counts with its wait until then."""
    ttft: list[float] = []
    first: list[float] = []
    gaps: list[np.ndarray] = []
    tpot: list[float] = []
    e2e: list[float] = []
    tokens, chunks, cut_short = 0, 0, 0
    for record in records:
        if not record.in_window or record.status not in ("ok", "cut short"):
            continue
        waited = max(0.0, end_s - record.intended_s)
        cut_short += record.status != "ok"
        ttft.append(waited if record.ttft_s is None else record.ttft_s)
        e2e.append(waited if record.e2e_s is None else record.e2e_s)
        first.append(record.intended_s + ttft[-1])
        gaps.append(np.asarray(record.chunk_gaps_s, dtype=np.float64))
        later = record.later_tokens
        tokens += later + int(np.sum(record.chunk_tokens[:1]))
        chunks += len(record.chunk_tokens)
        if record.status == "ok" and later:
            # Until the last chunk, not the end of the stream: the usage that follows is not a token.
            tpot.append(record.decode_s / later)
    itl, itl_steps = joined_gaps(first, gaps)
    return Latencies(
        ttft=_ms(ttft),
        itl=itl * 1e3,
        itl_steps=itl_steps,
        tpot=_ms(tpot),
        e2e=_ms(e2e),
        tokens_per_chunk=tokens / chunks if chunks else 1.0,
        cut_short=cut_short,
    )


def token_rates(records: Sequence[RequestRecord], start_s: float, end_s: float) -> tuple[float, float]:
    """Input and output tokens/s of all requests within the window: prompts at their first token, outputs on arrival."""
    inputs, outputs = 0, 0
    for record in records:
        if record.ttft_s is None or not len(record.chunk_tokens):
            continue
        first = record.intended_s + record.ttft_s
        inputs += record.input_tokens if start_s <= first < end_s else 0
        arrivals = first + np.concatenate(([0.0], np.cumsum(record.chunk_gaps_s)))
        counted = np.asarray(record.chunk_tokens[: len(arrivals)])
        arrivals = arrivals[: len(counted)]
        outputs += int(counted[(arrivals >= start_s) & (arrivals < end_s)].sum())
    window = max(end_s - start_s, 1e-9)
    return inputs / window, outputs / window


def goodput(records: Sequence[RequestRecord], limits: Mapping[str, float], window_s: float) -> float | None:
    """Requests/s of the window that met every limit (column of PointRecord -> ms); None without limits.

    Limits apply to each request individually: to its TTFT, TPOT and E2E latency, and to the percentile of its own gaps.
    """
    if not limits:
        return None
    good = sum(record.in_window and record.status == "ok" and _meets(record, limits) for record in records)
    return good / window_s if window_s > 0 else 0.0


def _meets(record: RequestRecord, limits: Mapping[str, float]) -> bool:
    for column, allowed_ms in limits.items():
        metric, q = re.fullmatch(r"(\w+)_p(\d+)_ms", column).groups()  # type: ignore[union-attr]
        if metric == "ttft":
            seen = record.ttft_s
        elif metric == "e2e":
            seen = record.e2e_s
        elif len(record.chunk_tokens) < 2:
            continue  # no gaps
        elif metric == "tpot":
            seen = record.decode_s / max(1, record.later_tokens)
        else:
            seen = percentile(np.asarray(record.chunk_gaps_s), float(q))
        if seen is None or seen * 1e3 > allowed_ms:
            return False
    return True


def _ms(seconds: list[float]) -> np.ndarray:
    return np.asarray(seconds, dtype=np.float64) * 1e3
