"""Energy that the server's GPUs use in the measuring window: readings in a thread, and the sum over the window."""

import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from bench.errors import BenchError
from bench.results import PointRecord

READ_EVERY_S = 0.2
MOST_GAP_S = 2.0  # between two readings: longer gaps are not interpolated


class EnergyError(BenchError):
    """Energy cannot be measured, or one reading failed; one line."""


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One of both: a counter in joules since an unknown time or, for a GPU without one, its power in watts now."""

    energy_j: float | None = None
    power_w: float | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """All GPUs at one time, in seconds on a monotonic clock."""

    at_s: float
    gpus: tuple[GpuReading, ...]


class EnergyMeter(Protocol):
    def read(self) -> tuple[GpuReading, ...]:
        """Read all GPUs, always in the same order. Raises EnergyError."""
        ...


class EnergyReader:
    """Reads a meter five times a second in a thread; without a meter it knows no energy.

    Args:
        meter: of the server's GPUs.
    """

    def __init__(self, meter: EnergyMeter | None = None, every_s: float = READ_EVERY_S):
        self._meter = meter
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._one_at_a_time = threading.Lock()  # the caller reads besides the thread: counters must be in order
        self._readings: list[Reading] = []
        self.problem = ""  # why the last reading that failed did

    def __enter__(self) -> "EnergyReader":
        if self._meter is not None:
            self._thread = threading.Thread(target=self._run, name="energy", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.read()

    def read(self) -> None:
        """Take one reading now; one that fails leaves a gap."""
        if self._meter is None:
            return
        with self._one_at_a_time:
            before = time.monotonic()
            try:
                gpus = self._meter.read()
            except EnergyError as error:
                self.problem = str(error)
                return
            self._readings.append(Reading((before + time.monotonic()) / 2, gpus))

    def clear(self) -> None:
        """Drop all readings and take one, before a load point."""
        with self._one_at_a_time:
            self._readings.clear()
        self.read()

    def joules(self, start_s: float, end_s: float) -> float | None:
        """The energy of the window; None if it is not known."""
        return window_energy(list(self._readings), start_s, end_s)


def window_energy(readings: Sequence[Reading], start_s: float, end_s: float) -> float | None:
    """Joules of all GPUs in the window.

    Args:
        readings: by time.

    Returns None if there are no GPUs, if the readings do not cover the window, or if a counter was reset in it.
    """
    times = [reading.at_s for reading in readings]
    first, last = bisect_right(times, start_s) - 1, bisect_left(times, end_s)
    if first < 0 or last >= len(times) or end_s <= start_s or not readings[0].gpus:
        return None
    inside = readings[first : last + 1]
    parts = [_gpu_energy(times[first : last + 1], list(gpu), (start_s, end_s)) for gpu in _by_gpu(inside)]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def record_energy(record: PointRecord, joules: float | None, seconds: float) -> None:
    """Set the load point's columns about energy; both stay empty if it is not known.

    Args:
        joules: of the window, up to the last response at least.
        seconds: in which they were used.
    """
    if joules is None:
        return
    record.mean_power_w = joules / seconds
    tokens = record.output_tok_s * record.window_s
    if tokens > 0:
        record.joules_per_output_token = joules / tokens


def _by_gpu(readings: Sequence[Reading]) -> list[tuple[GpuReading, ...]]:
    return list(zip(*(reading.gpus for reading in readings), strict=True))


def _gpu_energy(times: list[float], gpu: Sequence[GpuReading], window: tuple[float, float]) -> float | None:
    """Joules of one GPU; the first reading is not after the window's start, and the last not before its end."""
    gaps = [later - earlier for earlier, later in pairwise(times)]
    counters = [reading.energy_j for reading in gpu if reading.energy_j is not None]
    if len(counters) == len(gpu):
        # A gap within the window loses nothing, since the counter goes on.
        if max(gaps[0], gaps[-1]) > MOST_GAP_S or any(later < earlier for earlier, later in pairwise(counters)):
            return None
        start, end = np.interp(window, times, counters)
        return float(end - start)
    powers = [reading.power_w for reading in gpu if reading.power_w is not None]
    if len(powers) < len(gpu) or max(gaps) > MOST_GAP_S:
        return None
    at = np.array([window[0], *(time_s for time_s in times if window[0] < time_s < window[1]), window[1]])
    watts = np.interp(at, times, powers)
    return float(np.sum(np.diff(at) * (watts[1:] + watts[:-1]) / 2))
