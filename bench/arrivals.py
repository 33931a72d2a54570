"""When requests are sent: arrival times drawn ahead from a seed, or replayed from a trace."""

import csv
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError

KINDS = ("poisson", "constant", "gamma")  # drawn; a trace is the fourth

_APART_S = 2e-9  # times end up as whole nanoseconds: the first of a part must not fall into the part before
_COLUMNS = {
    "times": ("timestamp", "time", "arrival", "arrival_s", "time_s"),
    "inputs": ("input_tokens", "input_length", "prompt_tokens", "input"),
    "outputs": ("output_tokens", "output_length", "completion_tokens", "output"),
}


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded requests, sorted by time: seconds since the first, and tokens where the file has them."""

    stem: str
    times: np.ndarray  # float64[count], count >= 2
    inputs: list[int] | None
    outputs: list[int] | None

    @property
    def rate(self) -> float:
        """The mean rate in requests/s, from the first arrival to the last."""
        return (len(self.times) - 1) / float(self.times[-1])


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How arrival times come about, as plain data; `trace` is a file, whose arrivals are scaled to the rate asked."""

    kind: str = "poisson"
    burstiness: float = 1.0
    trace: str | None = None

    def __post_init__(self) -> None:
        if self.trace is not None:
            read_trace(self.trace)
        elif self.kind not in KINDS:
            raise BenchError(f"unknown kind of arrivals {self.kind!r}: choose from {', '.join(KINDS)} (--arrivals)")

    def schedule(self, rate: float, parts: Sequence[float], seed: int) -> np.ndarray:
        """Sorted send times in seconds over parts of the given lengths, the first one 0.

        Drawn arrivals are drawn apart for each part, so that each holds exactly rate x length of them. A trace is
        replayed from its beginning over all parts, and again after its end.
        """
        if self.trace is not None:
            return replay(read_trace(self.trace), rate, sum(parts))
        drawn, start_s = [np.zeros(0)], 0.0
        for part, length_s in enumerate(parts):
            if length_s > 0:
                times = arrival_times(rate, length_s, seed + part, self.kind, self.burstiness)
                drawn.append(start_s + times[times < length_s])
            start_s += length_s + _APART_S
        return np.concatenate(drawn)


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
    """The trace's arrivals before `length_s`, scaled to a mean of `rate`, over and over."""
    if not (rate > 0 and np.isfinite(rate)):
        raise BenchError(f"the request rate must be a positive number, not {rate} (--rate)")
    once = trace.times * (trace.rate / rate)
    period = len(once) / rate
    rounds = int(np.ceil(length_s / period)) or 1
    times = np.concatenate([once + i * period for i in range(rounds)])
    return times[times < max(length_s, 1e-9)]


@functools.lru_cache(maxsize=4)
def read_trace(path: str) -> Trace:
    """Read a CSV or JSONL file with the column timestamp, in seconds, and perhaps input_tokens and output_tokens."""
    try:
        with Path(path).expanduser().open(encoding="utf-8", newline="") as f:
            rows = [{str(k).strip().lower(): v for k, v in row.items()} for row in _trace_rows(f.read())]
    except OSError as error:
        raise BenchError(f"{path}: can't be read: {error.strerror} (--trace)") from None
    except ValueError as error:
        raise BenchError(f"{path}: is neither CSV nor JSONL: {error} (--trace)") from None
    times = _column(rows, "times", path)
    if times is None:
        raise BenchError(f"{path}: has no column timestamp, in seconds (--trace)")
    if len(times) < 2 or max(times) <= min(times):
        raise BenchError(f"{path}: a trace needs at least two requests at different times (--trace)")
    order = np.argsort(times, kind="stable")
    lengths: list[list[int] | None] = []
    for part in ("inputs", "outputs"):
        tokens = _column(rows, part, path)
        if tokens is not None and not all(value >= 1 and value == int(value) for value in tokens):
            raise BenchError(f"{path}: {_COLUMNS[part][0]} must be whole numbers from 1 on (--trace)")
        lengths.append(None if tokens is None else [int(tokens[i]) for i in order])
    at = np.asarray(times, dtype=np.float64)[order]
    return Trace(Path(path).stem, at - at[0], *lengths)


def _trace_rows(text: str) -> Iterator[dict[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith("{"):
        for line in lines:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line is not an object")
            yield row
        return
    yield from csv.DictReader(lines)


def _column(rows: list[dict[str, Any]], part: str, path: str) -> list[float] | None:
    name = next((name for name in _COLUMNS[part] if rows and name in rows[0]), None)
    if name is None:
        return None
    values = []
    for number, row in enumerate(rows, 1):
        try:
            value = float(row[name])
        except (KeyError, TypeError, ValueError):
            value = float("nan")
        if not np.isfinite(value):
            raise BenchError(f"{path}: row {number} has no number in its column {name} (--trace)")
        values.append(value)
    return values
