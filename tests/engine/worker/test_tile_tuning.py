"""The choice of tiles from times that a stand-in gives, and the timer over a stand-in for a device's clock."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from engine.errors import ConfigError
from engine.kernels.tile_table import SHARED_KIB, Launch, Numbers, Tile, check_tile
from engine.worker.tile_tuning import (
    BATCH_S,
    MOST_RUNS,
    PROGRAMS,
    WORKLOADS,
    Choice,
    DeviceTimer,
    Workload,
    candidates,
    choose,
    steps,
)

LONG, SHORT = Workload(1, 1, 8192), Workload(64, 1, 1500)
BUILTIN = Tile(16, 64, 4, 3, 3)
FAST, MIXED, BROKEN = replace(BUILTIN, keys=128), replace(BUILTIN, warps=8), replace(BUILTIN, stages=4)


def run(seconds: Callable[[Tile, Workload], float | None], tiles: list[Tile]) -> tuple[Choice, list[str]]:
    said: list[str] = []
    return choose(BUILTIN, tiles, (LONG, SHORT), seconds, said.append), said


def test_the_lowest_mean_of_the_ratios_wins() -> None:
    def seconds(tile: Tile, workload: Workload) -> float | None:
        by_tile = {BUILTIN.keys: (10e-6, 100e-6), FAST.keys: (9e-6, 80e-6)}
        if tile.warps == MIXED.warps:
            return (6e-6, 125e-6)[workload == SHORT]  # the ratio of the times' sums would be below the other's
        return by_tile[tile.keys][workload == SHORT]

    choice, said = run(seconds, [MIXED, FAST])
    assert choice.tile == FAST
    assert choice.builtin == BUILTIN
    assert choice.seconds == {LONG: (10e-6, 9e-6), SHORT: (100e-6, 80e-6)}
    assert choice.gain == pytest.approx(1 - (0.9 * 0.8) ** 0.5)
    assert said[0] == "16×64, 4 warps, 3 stages, 3 programs: 1.00 × the built-in tile's time"
    assert len(said) == 3 + len(PROGRAMS) - 1
    assert len(said) <= steps([MIXED, FAST])


def test_numbers_of_programs_are_tried_with_the_fastest_tile() -> None:
    def seconds(tile: Tile, _: Workload) -> float:
        return (1e-3 if tile.keys == FAST.keys else 2e-3) * (0.5 if tile.programs == 4 else 1)

    choice, _ = run(seconds, [FAST])
    assert choice.tile == replace(FAST, programs=4)


def test_a_small_gain_keeps_the_builtin_tile() -> None:
    choice, _ = run(lambda tile, _: 0.995e-3 if tile == FAST else 1e-3, [FAST])
    assert choice.tile == BUILTIN
    assert choice.gain == 0
    assert choice.seconds[LONG] == (1e-3, 1e-3)


def test_tiles_that_cannot_be_used_or_are_far_slower_are_left_out() -> None:
    measured: list[tuple[Tile, Workload]] = []

    def seconds(tile: Tile, workload: Workload) -> float | None:
        measured.append((tile, workload))
        return None if tile.stages == BROKEN.stages else 1.5e-3 if tile.warps == MIXED.warps else 1e-3

    choice, said = run(seconds, [BROKEN, MIXED])
    assert choice.tile == BUILTIN
    assert choice.measured == 1 + len(PROGRAMS) - 1
    assert [text.partition(": ")[2] for text in said[1:3]] == ["left out", "left out"]
    assert [workload for tile, workload in measured if tile in (BROKEN, MIXED)] == [LONG, LONG]


def test_without_the_builtin_tile_the_first_that_can_be_used_is_the_measure() -> None:
    def seconds(tile: Tile, _: Workload) -> float | None:
        return None if tile.keys == BUILTIN.keys else 1e-3 if tile.warps == 4 else 0.5e-3

    other = replace(FAST, warps=8)
    choice, _ = run(seconds, [FAST, other])
    assert choice.tile == other
    assert choice.seconds[LONG] == (1e-3, 0.5e-3)


def test_a_gpu_for_which_nothing_fits() -> None:
    with pytest.raises(ConfigError, match="none of 2 tiles can be used on this GPU"):
        run(lambda *_: None, [FAST])


@pytest.mark.parametrize("target", [*SHARED_KIB, "interpreter"])
@pytest.mark.parametrize("numbers", ["16-bit", "float32", "8-bit cache"])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("launch", ["decode", "prefill"])
def test_candidates_are_allowed_in_tables(target: str, numbers: Numbers, dim: int, launch: Launch) -> None:
    tiles = candidates(launch, numbers, dim, target, 2)
    assert 4 <= len(tiles) <= 40
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        check_tile(tile, (numbers, dim, launch), target)


def test_workloads_fit_their_launch() -> None:
    assert all(one.new == 1 for one in WORKLOADS["decode"])
    assert all(one.new >= 128 for one in WORKLOADS["prefill"])
    assert [str(one) for one in (LONG, Workload(4, 512, 0), Workload(1, 512, 4096))] == [
        "1 × 1 token after 8,192", "4 × 512 tokens", "1 × 512 tokens after 4,096",
    ]  # fmt: skip


class Clock:
    """A device on which a run takes `run_s`, and every third batch ten times as long."""

    def __init__(self, run_s: float):
        self.run_s = run_s
        self.now_s = 0.0
        self.runs: list[int] = []
        self.batches = 0

    def run(self, number: int) -> None:
        self.runs.append(number)
        self.now_s += self.run_s

    def capture(self, batch: Callable[[], None]) -> Callable[[], None]:
        batch()

        def replay() -> None:
            self.batches += 1
            began = self.now_s
            batch()
            if self.batches % 3 == 0:
                self.now_s = began + 10 * (self.now_s - began)

        return replay

    def clock(self) -> float:
        return self.now_s

    def elapsed(self, began: float, ended: float) -> float:
        return ended - began


@pytest.mark.parametrize(("run_s", "runs"), [(1e-3, 4), (30e-6, MOST_RUNS), (50e-3, 1)])
def test_the_median_of_batches_counts(run_s: float, runs: int) -> None:
    clock = Clock(run_s)
    seconds = DeviceTimer(cast("Any", clock), repeats=7)(clock.run)
    assert seconds == pytest.approx(run_s)
    assert clock.batches == 8
    assert clock.runs[2 : 2 + runs] == list(range(runs))  # a captured batch takes the caches in turn
    assert len(clock.runs) == 2 + 9 * runs
    assert runs == MOST_RUNS or runs * run_s >= BATCH_S
