"""The model and its KV cache on one rank, as the runner sees them."""

from typing import Protocol

from torch import Tensor

from engine.arrays import Float32s, Float64s, Int64s
from engine.grammar import RowMasks
from engine.model.lora.lora_weights import Adapter
from engine.worker.slots import StepBatch


class ModelBackend(Protocol):
    """Computes steps. The tokens of a step are chosen before the next step runs."""

    def forward(self, batch: StepBatch) -> None:
        """Compute the hidden states of a step, up to the positions whose logits are needed."""
        ...

    def logits(self, which: Int64s) -> Tensor:
        """Logits of some entries of `batch.logits_at`: [len(which), vocabulary]."""
        ...

    def choose(self, temperatures: Float32s, uniforms: Float64s, masks: RowMasks | None = None) -> Int64s:
        """One token for each of the first entries of `batch.sampled_at`.

        Args:
            temperatures: [n]; at 0 the greedy token is taken.
            uniforms: [n], numbers in [0, 1); with a temperature above 0 the token is drawn by this number.
            masks: the tokens that some of the entries may choose. Their `logits` aren't asked for any more.
        """
        ...

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        """Load an adapter, sharded for this rank, into a free slot. Raises ModelError if it does not fit the model."""
        ...

    def drop_adapter(self, slot: int) -> None:
        """Unload the adapter of a slot that no request uses."""
        ...
