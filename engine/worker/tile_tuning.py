"""Chooses the fastest tiles of the attention kernels by measuring them on a device. Needs the package `triton`.

A candidate counts by the geometric mean, over several workloads, of its time relative to the built-in tile's.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol

from engine.errors import ConfigError
from engine.kernels.tile_table import BYTES, Launch, Numbers, Tile, check_tile
from engine.worker.device import Device

REPEATS = 7  # measurements, of which the median counts
BATCH_S = 4e-3  # of one measurement, as many runs as that takes
MOST_RUNS = 32
PROGRAMS = (1, 2, 3, 4, 6)
HOPELESS = 1.3  # times the built-in tile's time: the other workloads are not measured
LEAST_GAIN = 0.01  # of the time: less keeps the built-in tile
# Of a thread; with more the compiler spills registers.
MOST_SUMS = 96  # float32 sums
MOST_KEYS = 128  # numbers of keys


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows of a step, each with `new` tokens after `context` tokens."""

    rows: int
    new: int
    context: int

    def __str__(self) -> str:
        if self.new == 1:
            return f"{self.rows} × 1 token after {self.context:,}"
        return f"{self.rows} × {self.new:,} tokens" + (f" after {self.context:,}" if self.context else "")


WORKLOADS: dict[Launch, tuple[Workload, ...]] = {
    "decode": (Workload(64, 1, 1500), Workload(16, 1, 4096), Workload(1, 1, 8192)),
    "prefill": (Workload(1, 2048, 0), Workload(4, 512, 0), Workload(1, 512, 4096)),
}

Measure = Callable[[Tile, Workload], float | None]  # seconds; None: the tile can't be used
Report = Callable[[str], None]  # called after each candidate


class Timer(Protocol):
    def __call__(self, run: Callable[[int], None]) -> float:
        """Seconds of one run on the device; `run` gets the number of the run."""
        ...


class DeviceTimer:
    """Implements `Timer`: the median of several captured batches of runs, by the device's own clock."""

    def __init__(self, device: Device, repeats: int = REPEATS):
        self._device = device
        self._repeats = repeats

    def __call__(self, run: Callable[[int], None]) -> float:
        run(0)  # compiles
        alone = self._elapsed(lambda: run(1))
        runs = min(max(math.ceil(BATCH_S / max(alone, 1e-6)), 1), MOST_RUNS)

        def batch() -> None:
            for number in range(runs):
                run(number)

        replay = self._device.capture(batch)
        replay()
        return statistics.median(self._elapsed(replay) for _ in range(self._repeats)) / runs

    def _elapsed(self, enqueue: Callable[[], None]) -> float:
        began = self._device.clock()
        enqueue()
        return self._device.elapsed(began, self._device.clock())


@dataclass(frozen=True, slots=True)
class Choice:
    """The fastest tile; `seconds` has for each workload the time of the built-in tile and that of the chosen one."""

    tile: Tile
    builtin: Tile
    seconds: dict[Workload, tuple[float, float]]
    measured: int  # tiles that could be used

    @property
    def gain(self) -> float:
        """The part of the time that the chosen tile saves, by the geometric mean."""
        return 1 - _mean_ratio([(chosen, builtin) for builtin, chosen in self.seconds.values()])


def candidates(launch: Launch, numbers: Numbers, dim: int, target: str, programs: int) -> list[Tile]:
    """The tiles to measure for a padded head dim, without those that are known not to fit the target."""
    key_sizes = (16, 32, 64) if BYTES[numbers] == 4 else (32, 64, 128)
    if launch == "decode":
        options = product((16,), key_sizes, (2, 4, 8), (2, 3))
    else:
        options = product((32, 64, 128), key_sizes, (4, 8), (2, 3))
    tiles = []
    for lines, keys, warps, stages in options:
        tile = Tile(lines, keys, warps, stages, programs)
        if lines * dim > MOST_SUMS * warps * 32 or keys * dim > MOST_KEYS * warps * 32:
            continue
        try:
            check_tile(tile, (numbers, dim, launch), target)
        except ValueError:
            continue
        tiles.append(tile)
    return tiles


def choose(
    builtin: Tile, tiles: Sequence[Tile], workloads: Sequence[Workload], measure: Measure, report: Report
) -> Choice:
    """Measure tiles, then numbers of programs with the fastest one.

    Raises ConfigError if no tile can be used.
    """
    base: dict[Workload, float] = {}
    best: tuple[float, Tile, dict[Workload, float]] | None = None
    measured = 0

    def try_tile(tile: Tile) -> None:
        nonlocal base, best, measured
        times = _times(tile, workloads, measure, base)
        if times is not None:
            measured += 1
            base = base or times
            ratio = _mean_ratio([(times[one], base[one]) for one in workloads])
            if best is None or ratio < best[0]:
                best = ratio, tile, times
        report(_text(tile, times, base))

    for tile in (builtin, *(one for one in tiles if one != builtin)):
        try_tile(tile)
    if best is None:
        raise ConfigError(f"none of {len(tiles) + 1} tiles can be used on this GPU")
    fastest = best[1]
    for programs in PROGRAMS:
        if programs != fastest.programs:
            try_tile(replace(fastest, programs=programs))
    ratio, tile, times = best
    if ratio > 1 - LEAST_GAIN:
        tile, times = builtin, base
    return Choice(tile, builtin, {one: (base[one], times[one]) for one in workloads}, measured)


def steps(tiles: Sequence[Tile]) -> int:
    """How often `choose` reports at most."""
    return 1 + len(tiles) + len(PROGRAMS)


def _times(
    tile: Tile, workloads: Sequence[Workload], measure: Measure, base: dict[Workload, float]
) -> dict[Workload, float] | None:
    """The tile's times; None if it can't be used, or is far slower than the built-in tile in one of them."""
    times: dict[Workload, float] = {}
    for one in workloads:
        seconds = measure(tile, one)
        if seconds is None or seconds > HOPELESS * base.get(one, math.inf):
            return None
        times[one] = seconds
    return times


def _mean_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.geometric_mean(max(ours, 1e-9) / max(theirs, 1e-9) for ours, theirs in pairs)


def _text(tile: Tile, times: dict[Workload, float] | None, base: dict[Workload, float]) -> str:
    if times is None:
        return f"{tile}: left out"
    return f"{tile}: {_mean_ratio([(times[one], base[one]) for one in times]):.2f} × the built-in tile's time"
