"""The attention kernels as `engine.worker.tile_tuning` measures them. Needs the package `triton`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from triton.errors import TritonError

from engine.arrays import Int64s
from engine.kernels.tile_table import LAUNCHES, MIN_LINES, Launch, Numbers, Tile, TileTable
from engine.kernels.triton.attention import AttentionShape, Partials, Rows, Scores, Work, paged_attention
from engine.kernels.triton.kv_storage import LayerCache
from engine.kernels.triton.launch import Gpu
from engine.kernels.triton.tiles import builtin_tiles, numbers_of, tilings_of
from engine.kernels.work_list import Tilings, capacity, plan_work
from engine.worker.device import Device
from engine.worker.tile_tuning import WORKLOADS, Choice, Timer, Workload, candidates, choose, steps

CACHE_BYTES = 256 << 20  # at least that many are read in turn: in a model, other layers replace what the L2 cache holds
MOST_CACHES = 16
# Of a result, relative to the largest number of the built-in tile's: more is a mistake of the compiler.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class TunedShape:
    """A layer's attention, and how its numbers are stored. quantized: the cache has 8 bits, int8."""

    shape: AttentionShape
    dtype: torch.dtype
    quantized: bool = False

    @property
    def numbers(self) -> Numbers:
        return numbers_of(self.dtype.itemsize, self.quantized)

    def __str__(self) -> str:
        shape, cache = self.shape, ", KV cache in int8" if self.quantized else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape.heads} heads, {shape.kv_heads} KV heads of {shape.head_dim}, {dtype}{cache}"


class AttentionTask:
    """The attention of one layer for one workload, over as many caches as needed so that the L2 cache is no help."""

    def __init__(
        self,
        device: Device,
        tuned: TunedShape,
        workload: Workload,
        cache_bytes: int = CACHE_BYTES,
    ):
        shape, dtype = tuned.shape, tuned.dtype
        self._device = device
        self._shape = shape
        self._counts: Int64s = np.full(workload.rows, workload.new, np.int64)
        self._computed: Int64s = np.full(workload.rows, workload.context, np.int64)
        width = -(-(workload.context + workload.new) // shape.block_size)
        blocks = workload.rows * width
        tokens = workload.rows * workload.new
        kept = torch.int8 if tuned.quantized else dtype
        numbers = blocks * shape.kv_heads * shape.block_size * shape.head_dim
        copies = min(max(-(-cache_bytes // (2 * numbers * kept.itemsize)), 1), MOST_CACHES)
        self._caches = [self._make_cache(blocks, kept) for _ in range(copies)]
        self._query = device.zeros((tokens, shape.heads, shape.head_dim), dtype).normal_()
        self._out = device.zeros((tokens, shape.heads, shape.head_dim), dtype)
        order = np.random.default_rng(0).permutation(blocks).reshape(workload.rows, width)
        starts = np.cumsum(self._counts) - self._counts
        self._rows = Rows(*(self._place(one) for one in (order, starts, self._counts, self._computed)))
        self._expected: Tensor | None = None

    def _make_cache(self, blocks: int, kept: torch.dtype) -> LayerCache:
        shape = self._shape
        size = (blocks, shape.kv_heads, shape.block_size, shape.head_dim)
        if kept != torch.int8:
            return LayerCache(*(self._device.zeros(size, kept).normal_() for _ in range(2)))
        scales = [self._device.zeros(size[:3], torch.float32).fill_(1 / 64) for _ in range(2)]
        return LayerCache(*(self._device.zeros(size, kept).random_(-127, 128) for _ in range(2)), *scales)

    def _place(self, numbers: np.ndarray) -> Tensor:
        return self._device.place(torch.from_numpy(np.ascontiguousarray(numbers, np.int32)))

    def prepare(self, tilings: Tilings) -> Callable[[int], None]:
        """What enqueues the attention once, over the caches in turn."""
        plan = plan_work(self._counts, self._computed, tilings)
        items = (self._place(one) if len(one) else None for one in (plan.decode, plan.prefill, plan.merges))
        work = Work(self._place(plan.sizes), *items)
        limit = capacity(tilings, len(self._counts), int(self._counts.sum()))
        partials = Partials.allocate(self._shape, limit, self._out.device)
        scores = Scores(self._shape.head_dim**-0.5)

        def run(number: int) -> None:
            cache = self._caches[number % len(self._caches)]
            paged_attention(
                self._query, cache, self._out, self._rows, work, self._shape, tilings, scores, partials
            )  # fmt: skip

        return run

    def is_right(self, run: Callable[[int], None]) -> bool:
        """Whether the result of a run is that of the first run that was asked about."""
        self._out.fill_(float("nan"))
        run(0)
        found = self._device.fetch(self._out).wait().float()
        if self._expected is None:
            self._expected = found.clone()
        largest = float(self._expected.abs().max())
        worst = float((found - self._expected).abs().max())
        return worst <= TOLERANCE[self._out.dtype] * largest  # not for NaN


class AttentionMeasure:
    """Implements `engine.worker.tile_tuning.Measure` for one launch of one shape.

    Args:
        launch: the other one keeps its built-in tile.
    """

    def __init__(
        self,
        launch: Launch,
        tuned: TunedShape,
        gpu: Gpu,
        make_task: Callable[[Workload], AttentionTask],
        timer: Timer,
    ):
        self._launch = launch
        self._shape = tuned.shape
        self._gpu = gpu
        self._make_task = make_task
        self._timer = timer
        self._pair = builtin_tiles(tuned.shape, tuned.numbers, gpu.target)
        self._tasks: dict[Workload, AttentionTask] = {}

    @property
    def builtin(self) -> Tile:
        return self._pair[self._launch == "prefill"]

    def __call__(self, tile: Tile, workload: Workload) -> float | None:
        if workload not in self._tasks:
            self._tasks[workload] = self._make_task(workload)
        task = self._tasks[workload]
        decode, prefill = (tile, self._pair[1]) if self._launch == "decode" else (self._pair[0], tile)
        try:
            run = task.prepare(tilings_of(self._shape, decode, prefill, self._gpu.multiprocessors))
            return self._timer(run) if task.is_right(run) else None
        except TritonError:  # it needs more shared memory or registers than there are, or does not compile
            return None


@torch.inference_mode()
def tune_attention(
    device: Device,
    tuned: TunedShape,
    gpu: Gpu,
    timer: Timer,
    progress: Callable[[int, int, str], None],
    *,
    workloads: Mapping[Launch, Sequence[Workload]] = WORKLOADS,
    cache_bytes: int = CACHE_BYTES,
) -> dict[Launch, Choice]:
    """The fastest tiles for a layer's shape, by launch; without decode where it uses the tile of prefill.

    Args:
        device: in the thread that uses it.
        gpu: that the device is.
        progress: gets the number of measured tiles, that of all, and a text about the last one.

    Raises ConfigError if no tile can be used.
    """

    def make_task(workload: Workload) -> AttentionTask:
        return AttentionTask(device, tuned, workload, cache_bytes)

    shape = tuned.shape
    launches = [one for one in LAUNCHES if one == "prefill" or shape.place_lines <= 2 * MIN_LINES]
    measures = {one: AttentionMeasure(one, tuned, gpu, make_task, timer) for one in launches}
    tiles = {
        one: candidates(one, tuned.numbers, shape.padded_dim, gpu.target, measure.builtin.programs)
        for one, measure in measures.items()
    }
    done, total = 0, sum(steps(found) for found in tiles.values())

    def report(text: str) -> None:
        nonlocal done
        done += 1
        progress(done, total, text)

    choices: dict[Launch, Choice] = {}
    for one in launches:
        measure = measures.pop(one)  # its caches are freed before those of the next one are made
        choices[one] = choose(measure.builtin, tiles[one], workloads[one], measure, report)
        del measure
    return choices


def table_of(choices: Mapping[Launch, Choice], tuned: TunedShape, target: str) -> TileTable:
    """The table of the chosen tiles."""
    dim = tuned.shape.padded_dim
    return TileTable(target, {(tuned.numbers, dim, one): choice.tile for one, choice in choices.items()})
