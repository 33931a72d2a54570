"""The tokens of each adapter in a step, among the arrays that a model backend plans."""

from collections.abc import Mapping

from torch import Tensor

from engine.model.lora.lora_hooks import tokens_by_adapter
from engine.worker.device import Columns
from engine.worker.slots import StepBatch

_PREFIX = "adapter."  # begins the names of these arrays


def plan_adapters(batch: StepBatch) -> Columns:
    """An array for each adapter in the batch: int64[n], indices of its tokens."""
    return {f"{_PREFIX}{slot}": tokens for slot, tokens in tokens_by_adapter(batch.adapter_slots, batch.row_of)}


def planned_adapters(planned: Mapping[str, Tensor]) -> list[tuple[int, Tensor]]:
    """Slots of adapters, and indices of their tokens on the device."""
    return [(int(name.removeprefix(_PREFIX)), tokens) for name, tokens in planned.items() if name.startswith(_PREFIX)]
