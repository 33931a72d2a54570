"""The samples of a load point, from its request file: latencies, and their timeline."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bench.results import PointRecord, RunFiles

MEASURED = ("ok", "cut short")


@dataclass(frozen=True, slots=True)
class Samples:
    """Latencies in ms of the requests of the window, sorted; TTFT is infinite for a request without a first token."""

    ttft: np.ndarray
    itl: np.ndarray  # gaps between chunks of all requests, pooled


@dataclass(frozen=True, slots=True)
class Moments:
    """The timeline of a load point, including its warm-up; times in seconds since its start, latencies in ms."""

    sent_s: np.ndarray  # intended times of the requests with a first token
    ttft: np.ndarray
    silent_s: np.ndarray  # intended times of requests that were cut short before their first token
    failed_s: np.ndarray  # intended times of failed requests
    gap_end_s: np.ndarray  # arrival of the chunk after each gap
    gap: np.ndarray
    open_s: np.ndarray  # times at which the number of open requests changed …
    open_count: np.ndarray  # … and the number after each change


def read_samples(folder: Path, point: PointRecord) -> Samples | None:
    """The latencies of a load point; None if its request file is missing."""
    rows = _read(folder, point)
    if rows is None:
        return None
    rows = rows[rows["in_window"] & rows["status"].isin(MEASURED)]
    ttft = rows["ttft_s"].to_numpy(dtype=float) * 1e3
    return Samples(np.sort(np.where(np.isnan(ttft), np.inf, ttft)), np.sort(_pooled(rows["chunk_gaps_s"]) * 1e3))


def read_moments(folder: Path, point: PointRecord) -> Moments | None:
    """The timeline of a load point; None if its request file is missing."""
    rows = _read(folder, point)
    if rows is None:
        return None
    measured = rows[rows["status"].isin(MEASURED)]
    begun = measured[measured["ttft_s"].notna()]
    first = (begun["intended_s"] + begun["ttft_s"]).to_numpy(dtype=float)
    gaps = [np.asarray(g, dtype=float) for g in begun["chunk_gaps_s"]]
    ends = [start + np.cumsum(g) for start, g in zip(first, gaps, strict=True)]
    open_s, open_count = _open_requests(rows, ends)
    return Moments(
        sent_s=begun["intended_s"].to_numpy(dtype=float),
        ttft=begun["ttft_s"].to_numpy(dtype=float) * 1e3,
        silent_s=measured[measured["ttft_s"].isna()]["intended_s"].to_numpy(dtype=float),
        failed_s=rows[~rows["status"].isin(MEASURED)]["intended_s"].to_numpy(dtype=float),
        gap_end_s=_joined(ends),
        gap=_joined(gaps) * 1e3,
        open_s=open_s,
        open_count=open_count,
    )


def _read(folder: Path, point: PointRecord) -> pd.DataFrame | None:
    try:
        return RunFiles(folder).read_requests(point.point_id)
    except FileNotFoundError:  # result folders may be copied without request files
        return None


def _open_requests(rows: pd.DataFrame, ends: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The number of open requests at the client over time, as a step function."""
    sent = rows["sent_s"].to_numpy(dtype=float)
    done = (rows["intended_s"] + rows["e2e_s"]).to_numpy(dtype=float)
    last = max([np.nanmax(sent, initial=0.0), np.nanmax(done, initial=0.0), *(e[-1] for e in ends if len(e))])
    # A request without an end was open until the load point ended; a failed one has no latency and is not counted.
    failed = ~rows["status"].isin(MEASURED).to_numpy()
    done = np.where(np.isnan(done), np.where(failed, sent, last), done)
    times = np.concatenate((sent, done))
    change = np.concatenate((np.ones(len(sent), dtype=int), -np.ones(len(done), dtype=int)))
    order = np.lexsort((-change, times))
    return times[order], np.cumsum(change[order])


def _pooled(column: pd.Series) -> np.ndarray:
    return _joined([np.asarray(values, dtype=float) for values in column])


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)
