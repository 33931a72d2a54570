"""The interface between workers and the encoders of multimodal inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class EncodedInput:
    """The embeddings of one input, in the order of the placeholder tokens that stand for one.

    embeddings: [n, hidden size of the decoder], in the model's dtype. deepstack: [layers, n, hidden size], added to the
    hidden states after the first layers; None for families without it.
    """

    embeddings: Tensor
    deepstack: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "EncodedInput":
        """The same in another dtype."""
        return EncodedInput(self.embeddings.to(dtype), None if self.deepstack is None else self.deepstack.to(dtype))


class Encoder(Protocol):
    """The tower and projector of one model."""

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one input.

        Args:
            tensors: those of its `Processed`, on the model's device.
        """
        ...
