"""Paged attention of transformers' classes on an asynchronous device.

An attention plans a step on the host, with numpy; its arrays travel with the step's other ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels import attention
from engine.kernels.attention import Chunk, Plan, Ragged, Scores, SingleTokens, Tile, Workspace
from engine.model.runtime.attention_interface import AttentionContext, KVCache
from engine.worker.device import Columns
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs

GroupWindow = tuple[int, int | None]  # a KV group, and how many tokens some of its layers attend to; None: all


class Attention(AttentionContext, Protocol):
    """The attention of all layers; the context of `engine.model.runtime.attention_interface.run_model`."""

    def plan(self, batch: StepBatch) -> Columns:
        """Arrays that the step needs on the device."""
        ...

    def begin(self, inputs: StepInputs) -> None:
        """Begin a step, whose planned arrays are on the device."""
        ...


class TorchAttention:
    """The reference, for devices without Triton.

    Args:
        cache: on the device.
        uses: the groups and windows of the model's layers, see `check_attention`.
        device: of torch, for temporary tensors.
    """

    def __init__(self, cache: KVCache, uses: Sequence[GroupWindow], device: torch.device):
        self._cache = cache
        self._uses = uses
        for use in uses:
            cache.check_window(*use)
        self._workspace = Workspace(cache.layout.dtype, device)
        self._host_plans: list[Plan] = []
        self._plans: dict[GroupWindow, Plan] = {}
        self._write_index: list[Tensor] = []

    def plan(self, batch: StepBatch) -> Columns:
        layout = self._cache.layout
        ragged = Ragged(batch.starts, batch.counts, batch.num_computed_tokens, batch.tables)
        self._host_plans = [
            attention.make_plan(replace(ragged, tables=batch.tables[group]), layout, window)
            for group, window in self._uses
        ]
        columns = {
            f"write_index.{group}": attention.write_index(table, batch.row_of, batch.positions, layout).numpy()
            for group, table in enumerate(batch.tables)
        }
        for number, plan in enumerate(self._host_plans):
            for i, tensor in enumerate(_tensors(plan)):
                columns[f"plan.{number}.{i}"] = _as_column(tensor)
        return columns

    def begin(self, inputs: StepInputs) -> None:
        planned, batch = inputs.planned, inputs.batch
        self._write_index = [planned[f"write_index.{group}"] for group in range(len(batch.tables))]
        self._plans = {
            use: _on_device(plan, f"plan.{number}", planned)
            for number, (use, plan) in enumerate(zip(self._uses, self._host_plans, strict=True))
        }

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None, scores: Scores
    ) -> Tensor:
        group, place = self._cache.groups.places[layer]
        keys, values, index = self._cache.keys[place], self._cache.values[place], self._write_index[group]
        attention.write(keys, index, key)
        attention.write(values, index, value)
        return attention.attend(query, keys, values, self._plans[group, window], scores, self._workspace)


def _tensors(plan: Plan) -> list[Tensor]:
    """All tensors of a plan, in a fixed order."""
    found = [tensor for single in plan.singles for tensor in (single.tokens, single.index, single.bias)]
    for chunk in plan.chunks:
        found += [chunk.index, *(tile.lower for tile in chunk.tiles if tile.lower is not None)]
    return found


def _on_device(plan: Plan, name: str, planned: Mapping[str, Tensor]) -> Plan:
    """The plan with its tensors replaced by those on the device, in the order of `_tensors`."""
    numbers = iter(range(len(planned)))

    def moved(tensor: Tensor) -> Tensor:
        return planned[f"{name}.{next(numbers)}"].view(tensor.dtype)

    singles = [SingleTokens(moved(one.tokens), moved(one.index), moved(one.bias), one.blocks) for one in plan.singles]
    chunks = []
    for chunk in plan.chunks:
        index = moved(chunk.index)
        tiles = tuple(
            Tile(tile.first, tile.last, tile.low, tile.high, None if tile.lower is None else moved(tile.lower))
            for tile in chunk.tiles
        )
        chunks.append(Chunk(chunk.start, index, chunk.blocks, tiles))
    return Plan(plan.layout, singles, chunks)


def _as_column(tensor: Tensor) -> NDArray[Any]:
    """A host tensor as an array; numpy has no bfloat16, so its bits are passed."""
    array: NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return np.ascontiguousarray(array)
