"""The model and its KV cache on an asynchronous device, as the runner sees them."""

from typing import Protocol

from torch import Tensor

from engine.arrays import Int64s
from engine.grammar import RowMasks
from engine.model.lora.lora_weights import Adapter
from engine.worker.device import Columns
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs


class DeviceBackend(Protocol):
    """Enqueues the computation of steps; the tokens of a step are chosen before the next step."""

    def plan(self, batch: StepBatch) -> Columns:
        """Arrays that the step needs on the device, under names that the backend finds in `StepInputs.planned`."""
        ...

    def forward(self, inputs: StepInputs) -> None:
        """Enqueue the model, up to the logits of `inputs.logits_at`. May be repeated."""
        ...

    def exclude(self, masks: RowMasks) -> None:
        """Enqueue the exclusion of all tokens but those of the masks from the choice for some of `sample_slots`.

        Their `logits` aren't asked for any more. May be repeated.
        """
        ...

    def choose(self, inputs: StepInputs) -> Tensor:
        """One token for each of `inputs.sample_slots`: int32[n] on the device."""
        ...

    def logits(self, which: Int64s) -> Tensor:
        """Logits of some entries of `inputs.logits_at`, on the device: [len(which), vocabulary]."""
        ...

    def resume(self, rows: int) -> None:
        """Use the logits of a captured `forward` that was replayed, whose `logits_at` had `rows` entries."""
        ...

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        """Load an adapter, cut to this rank, into a free slot. Raises ModelError if it does not fit the model."""
        ...

    def drop_adapter(self, slot: int) -> None:
        """Unload the adapter of a slot that no request uses."""
        ...
