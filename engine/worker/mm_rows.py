"""The embeddings of multimodal inputs in one step."""

from dataclasses import dataclass

from torch import Tensor

from engine.arrays import Int64s
from engine.kernels.attention import Span


@dataclass(frozen=True, slots=True)
class MMRows:
    """Tokens of a step whose embeddings come from an encoder.

    at: int64[n], their indices in the batch, ascending. embeddings: [n, hidden], in the model's dtype. deepstack:
    [layers, n, hidden], see `EncodedInput`; None without it. spans: tokens of the step's inputs that attend to
    each other.
    """

    at: Int64s
    embeddings: Tensor
    deepstack: Tensor | None = None
    spans: tuple[Span, ...] = ()
