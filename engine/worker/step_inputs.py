"""What a step puts on the device, and what the device keeps for all slots from step to step.

Example of `engine.worker.slots`, where the token of slot 0 is sampled by a step that is still in flight:

    ids          [-1, 7, 8, 9]     the device replaces -1 by the newest token of slot 0
    slot_of      [0, 2, 2, 2]
    positions    [6, 0, 1, 2]
    logits_at    [0]
    sample_slots, sample_counts    [0], [4]: slot 0 has 4 output tokens
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.arrays import Int32s, Int64s
from engine.kernels import sampling, slot_state, token_masks
from engine.kernels.sampling import Draws
from engine.worker.device import Device
from engine.worker.device_slots import DeviceSlots, StateLayout
from engine.worker.slots import StepBatch
from engine.worker.step_sizes import Padding, StepSize

# Words of the slots' state that travel with a step; more travel before it. Padded steps always have as many.
MAX_CHANGES = 16 << 10
PADDED_CHANGES = 1 << 10

ChooseTokens = Callable[[Tensor, Tensor, Tensor, Tensor, Draws], Tensor]  # see `engine.kernels.sampling.choose_tokens`


@dataclass(frozen=True, slots=True)
class StepKernels:
    """The kernels that a step needs beside the model's, by default those in torch.

    `choose_tokens` and `exclude_tokens` get the logits of this rank.
    """

    gather_ids: Callable[[Tensor, Tensor, Tensor], None] = slot_state.gather_ids
    append_tokens: Callable[[Tensor, Tensor, Tensor], None] = slot_state.append_tokens
    write_elements: Callable[[Tensor, Tensor, Tensor, Tensor], None] = slot_state.write_elements
    choose_tokens: ChooseTokens = sampling.choose_tokens
    exclude_tokens: Callable[[Tensor, Tensor, Tensor], None] = token_masks.exclude_tokens

    def sharded(self, gather: Callable[[Tensor], Tensor]) -> "StepKernels":
        """The same kernels for ranks that divide the vocabulary: each chooses from the logits of all ranks.

        Args:
            gather: the logits of all ranks, given those of this rank.
        """
        choose = self.choose_tokens

        def choose_tokens(logits: Tensor, parameters: Tensor, slots: Tensor, counts: Tensor, draws: Draws) -> Tensor:
            return choose(gather(logits), parameters, slots, counts, draws)

        return replace(self, choose_tokens=choose_tokens)


class DeviceState:
    """What the device keeps for each slot.

    last_token: int32[slots], the newest token, written by the step that samples it.
    tables: int32[groups, slots, blocks], the block tables.
    parameters: int32[slots, 8], how tokens are sampled, see `engine.kernels.sampling`.
    """

    def __init__(self, device: Device, layout: StateLayout):
        self.words = device.zeros((layout.words,), torch.int32)
        self.last_token = device.zeros((layout.max_slots,), torch.int32)
        self.tables = self.words[: layout.tables].view(layout.num_groups, layout.max_slots, layout.max_blocks)
        self.parameters = self.words[layout.parameters :].view(layout.max_slots, -1)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step on the device; `batch` is the same on the host. The tensors are overwritten by the next step.

    ids, positions, slot_of: int32[tokens]; logits_at: int64[n + m], see `StepBatch.logits_at`.
    rotary: int32[3, tokens] with M-RoPE, else `positions`.
    sample_slots, sample_counts: int32[n], slot and number of output tokens of each entry of `batch.sampled_at`.
    planned: what the backend asked for, and the changes of the slots.
    size: to which the step is padded, so that its tensors have the addresses of other steps of this size; or None.
    """

    batch: StepBatch
    ids: Tensor
    positions: Tensor
    rotary: Tensor
    slot_of: Tensor
    logits_at: Tensor
    sample_slots: Tensor
    sample_counts: Tensor
    draws: Draws
    planned: Mapping[str, Tensor]
    size: StepSize | None = None

    @property
    def num_sampled(self) -> int:
        """How many of `sample_slots` aren't padding."""
        return len(self.batch.sampled_at)


class InputStager:
    """Lays out steps and puts them on the device, with what changed in the slots."""

    def __init__(self, device: Device, slots: DeviceSlots, state: DeviceState, kernels: StepKernels):
        self._device = device
        self._slots = slots
        self._state = state
        self._kernels = kernels

    def put(self, batch: StepBatch, planned: Mapping[str, NDArray[Any]], size: StepSize | None = None) -> StepInputs:
        """Enqueue the copy of a step and of the changes of the slots.

        Args:
            planned: arrays of the backend, which travel with the others; those of a padded step if there is a size.
        """
        slots = self._slots
        sample_slots = np.repeat(batch.sampling, batch.num_draft_tokens + 1)
        own: dict[str, NDArray[Any]] = {
            "sample_slots": sample_slots.astype(np.int32),
            "sample_counts": (slots.num_tokens - slots.num_prompt_tokens)[sample_slots].astype(np.int32),
            "logits_at": batch.logits_at,
            "ids": batch.ids.astype(np.int32),
            "positions": batch.positions.astype(np.int32),
            "slot_of": batch.slots[batch.row_of].astype(np.int32),
        }
        if size is not None:
            own = _pad(own, _layout(size))
        if batch.rotary_positions is not None:
            own["rotary"] = _rotary(batch.rotary_positions, len(own["ids"]))
        index, words = slots.take_changes()
        limit = MAX_CHANGES if size is None else PADDED_CHANGES
        while len(index) > limit:
            self._write(self._device.put(_changes(index[:limit], words[:limit])))
            index, words = index[limit:], words[limit:]
        changes = _changes(index, words)
        if size is not None:
            changes = _pad(changes, _CHANGES_LAYOUT)
        # Last, since their number varies: the arrays before them keep their addresses in steps of the same sizes.
        tensors = self._device.put({**own, **planned, **changes})
        return StepInputs(
            batch, tensors["ids"], tensors["positions"], tensors.get("rotary", tensors["positions"]),
            tensors["slot_of"], tensors["logits_at"], tensors["sample_slots"], tensors["sample_counts"],
            self._draws(batch), tensors, size,
        )  # fmt: skip

    def prepare(self, inputs: StepInputs) -> None:
        """Enqueue the changes of the slots, and the lookup of tokens that only the device has. May be repeated."""
        if len(inputs.planned["changed"]):
            self._write(inputs.planned)
        self._kernels.gather_ids(inputs.ids, self._state.last_token, inputs.slot_of)

    def _write(self, changes: Mapping[str, Tensor]) -> None:
        flat = self._state.words.view(1, -1)
        self._kernels.write_elements(flat, changes["changed_rows"], changes["changed"], changes["words"])

    def _draws(self, batch: StepBatch) -> Draws:
        slots = self._slots
        device_rows = batch.sampling[~slots.needs_logits[batch.sampling]]
        drawn = bool((slots.temperature[device_rows] > 0).any())
        return Draws(drawn, bool(slots.is_filtered[device_rows].any()))


def _pad(arrays: Mapping[str, NDArray[Any]], layout: Mapping[str, Padding]) -> dict[str, NDArray[Any]]:
    return {name: padding.pad(name, arrays[name]) for name, padding in layout.items()}


def _rotary(positions: Int64s, tokens: int) -> Int32s:
    """`StepInputs.rotary`, with zeros for padded tokens."""
    padded = np.zeros((3, tokens), dtype=np.int32)
    padded[:, : positions.shape[1]] = positions
    return padded


def _changes(index: Int32s, words: Int32s) -> dict[str, NDArray[Any]]:
    return {"changed_rows": np.zeros_like(index), "changed": index, "words": words}


_CHANGES_LAYOUT = {
    "changed_rows": Padding(PADDED_CHANGES, -1),
    "changed": Padding(PADDED_CHANGES),
    "words": Padding(PADDED_CHANGES),
}


@functools.cache
def _layout(size: StepSize) -> dict[str, Padding]:
    """The padded arrays: those of sampled tokens first, so that their addresses depend on `size.rows` alone.

    Padded tokens have no slot, and padded logits are those of the first token.
    """
    return {
        "sample_slots": Padding(size.rows, -1),
        "sample_counts": Padding(size.rows),
        "logits_at": Padding(size.rows),
        "ids": Padding(size.tokens),
        "positions": Padding(size.tokens),
        "slot_of": Padding(size.tokens, -1),
    }
