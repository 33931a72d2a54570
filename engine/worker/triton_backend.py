"""The Triton kernels as a step and the attention of transformers' classes use them. Needs the package `triton`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.devices.tile_files import read_table
from engine.kernels import work_list
from engine.kernels.attention import Scores
from engine.kernels.sampling import Draws
from engine.kernels.triton import attention as triton_attention
from engine.kernels.triton import launch, sampling, sampling_shards, slot_state, tiles, token_masks
from engine.kernels.triton.attention import AttentionShape, Partials, Rows, Work, paged_attention
from engine.kernels.triton.kv_storage import LayerCache
from engine.kernels.triton.rotary import write_cache
from engine.kernels.work_list import Tilings, plan_work
from engine.model.runtime.attention_interface import KVCache
from engine.model.runtime.vocab_shard import VocabShard, vocab_range
from engine.worker.device import Columns
from engine.worker.device_attention import GroupWindow
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs, StepKernels
from engine.worker.step_sizes import Padding, StepSize, pad_arrays

INTERPRETED_PROGRAMS = 4  # for each KV head


def triton_step_kernels(rows: int, vocabulary: int, device: torch.device) -> StepKernels:
    """The kernels of steps that choose at most `rows` tokens."""
    workspace = sampling.SamplingWorkspace.allocate(rows, vocabulary, device)
    out = torch.empty(rows, dtype=torch.int32, device=device)

    def choose_tokens(logits: Tensor, parameters: Tensor, slots: Tensor, counts: Tensor, draws: Draws) -> Tensor:
        tokens = out[: len(slots)]
        sampling.choose_tokens(logits, parameters, slots, counts, tokens, workspace, draws.any_filtered)
        return tokens

    return StepKernels(
        slot_state.gather_ids, slot_state.append_tokens, slot_state.write_elements, choose_tokens,
        token_masks.exclude_tokens,
    )  # fmt: skip


def sharded_step_kernels(rows: int, shard: VocabShard, device: torch.device) -> StepKernels:
    """As `triton_step_kernels`, for ranks that divide the vocabulary.

    Logits are gathered for steps in which rows have filters; of others the sums of runs.
    """
    group = shard.group
    whole = triton_step_kernels(rows, shard.total, device).sharded(shard.gather)
    runs = sampling_shards.runs_of(vocab_range(shard.total, 0, group.size)[1])  # the first ranks have the most tokens
    sums = torch.zeros(3 * rows * runs, dtype=torch.int32, device=device)
    out = torch.zeros(rows, dtype=torch.int32, device=device)
    own_runs, first = (group.rank * runs, runs), shard.first

    def choose_tokens(logits: Tensor, parameters: Tensor, slots: Tensor, counts: Tensor, draws: Draws) -> Tensor:
        if draws.any_filtered:
            return whole.choose_tokens(logits, parameters, slots, counts, draws)
        number = len(slots)
        own = sums[: 3 * number * runs].view(3, number, runs)
        sampling_shards.sum_runs(logits, parameters, slots, own)
        tokens = out[:number]
        of_all = group.all_gather(own)
        sampling_shards.choose_own(logits, parameters, slots, counts, of_all, own_runs, first, tokens)
        return group.all_reduce(tokens)

    return replace(whole, choose_tokens=choose_tokens)


def default_tilings(shape: AttentionShape, itemsize: int, *, quantized: bool = False, tile_table: str = "") -> Tilings:
    """The tilings of a shape on the calling thread's GPU, or in the interpreter.

    Args:
        itemsize: bytes of a number of queries.
        quantized: the cache has 8 bits.
        tile_table: a file with measured tiles, see `engine.devices.tile_files`; empty: none.

    Raises:
        ConfigError: the table can't be read, or is for another target.
    """
    gpu = tiles.INTERPRETED_GPU if launch.interpreted() else launch.current_gpu()
    table = read_table(Path(tile_table), gpu.target) if tile_table else None
    programs = INTERPRETED_PROGRAMS * shape.kv_heads if launch.interpreted() else gpu.multiprocessors
    return tiles.tilings(shape, itemsize, gpu.target, programs, quantized, table)


class TritonAttention:
    """Implements `engine.worker.device_attention.Attention`.

    Args:
        cache: on the device.
        uses: the groups and windows of the model's layers, see `check_attention`.
        tables: int32[groups, slots, blocks], the block tables on the device.
        shape: of the rank's layers.
        max_tokens: of a step.
    """

    def __init__(
        self,
        cache: KVCache,
        uses: Sequence[GroupWindow],
        tables: Tensor,
        shape: AttentionShape,
        tilings: Tilings,
        max_tokens: int,
    ):
        self._layout = cache.layout
        self._places = cache.groups.places
        slots = zip(cache.keys, cache.values, cache.key_scales, cache.value_scales, strict=True)
        self._caches = [LayerCache(*slot) for slot in slots]
        self._uses = uses
        for use in uses:
            cache.check_window(*use)
        self._tables = tables
        self.shape = shape
        self._tilings = tilings
        capacity = work_list.capacity(tilings, tables.shape[1], max_tokens)
        self._partials = Partials.allocate(shape, capacity, tables.device)
        self._layouts: dict[StepSize, dict[str, Padding]] = {}
        self._rows: list[Rows] = []
        self._work: dict[GroupWindow, Work] = {}
        self._cache_index: list[Tensor] = []

    def plan(self, batch: StepBatch) -> Columns:
        block_size = self._layout.block_size
        columns = {
            "starts": batch.starts.astype(np.int32),
            "counts": batch.counts.astype(np.int32),
            "num_computed": batch.num_computed_tokens.astype(np.int32),
            "slots": batch.slots.astype(np.int32),
        }
        for group, table in enumerate(batch.tables):
            blocks = table[batch.row_of, batch.positions // block_size]
            columns[f"cache_index.{group}"] = (blocks * block_size + batch.positions % block_size).astype(np.int32)
        for number, (_, window) in enumerate(self._uses):
            work = plan_work(batch.counts, batch.num_computed_tokens, self._tilings, window)
            columns[f"sizes.{number}"] = work.sizes
            for name, items in (("decode", work.decode), ("prefill", work.prefill), ("merges", work.merges)):
                if len(items):
                    columns[f"{name}.{number}"] = items
        return columns

    def padded(self, columns: Columns, size: StepSize) -> Columns | None:
        """The arrays of `plan` for a step of a padded size, always the same ones; None if there are others."""
        if size not in self._layouts:
            self._layouts[size] = self._layout_of(size)
        return pad_arrays(columns, self._layouts[size])

    def _layout_of(self, size: StepSize) -> dict[str, Padding]:
        capacity = work_list.capacity(self._tilings, size.rows, size.tokens)
        layout = {name: Padding(size.rows) for name in ("starts", "counts", "num_computed", "slots")}
        for group in range(len(self._tables)):
            layout[f"cache_index.{group}"] = Padding(size.tokens, -1)
        for number in range(len(self._uses)):
            layout[f"sizes.{number}"] = Padding(3)
            layout[f"decode.{number}"] = Padding(capacity.decode, columns=work_list.ITEM_COLUMNS)
            if size.mixed:
                layout[f"prefill.{number}"] = Padding(capacity.prefill, columns=work_list.ITEM_COLUMNS)
            layout[f"merges.{number}"] = Padding(capacity.merges, columns=work_list.MERGE_COLUMNS)
        return layout

    def begin(self, inputs: StepInputs) -> None:
        planned = inputs.planned
        starts, counts, computed, slots = (planned[name] for name in ("starts", "counts", "num_computed", "slots"))
        self._rows = [Rows(table, starts, counts, computed, slots) for table in self._tables]
        self._cache_index = [planned[f"cache_index.{group}"] for group in range(len(self._tables))]
        self._work = {}
        for number, use in enumerate(self._uses):
            decode, prefill, merges = (planned.get(f"{name}.{number}") for name in ("decode", "prefill", "merges"))
            self._work[use] = Work(planned[f"sizes.{number}"], decode, prefill, merges)

    def place(self, layer: int) -> tuple[LayerCache, Tensor]:
        """The layer's part of the KV cache, and where it stores the tokens of the step: int32[tokens], -1: nowhere."""
        group, place = self._places[layer]
        return self._caches[place], self._cache_index[group]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None, scores: Scores
    ) -> Tensor:
        cache, index = self.place(layer)
        write_cache(key, value, index, cache, self.shape)
        out = torch.zeros_like(query)  # also for padded tokens, with which a class may do anything
        self.attend_cached(layer, query, out, window, scores)
        return out

    def attend_cached(self, layer: int, query: Tensor, out: Tensor, window: int | None, scores: Scores) -> None:
        """Attend to the last `window` tokens, None for all; the keys and values of the step are in the cache already.

        Args:
            query, out: as of `paged_attention`.
        """
        group, place = self._places[layer]
        paged_attention(
            query,
            self._caches[place],
            out,
            self._rows[group],
            self._work[group, window],
            self.shape,
            self._tilings,
            triton_attention.Scores(scores.scaling, window, scores.softcap, scores.sinks),
            self._partials,
        )
