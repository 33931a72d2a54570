"""The ranks that run a model together, as its parts see them."""

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """All ranks make the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, the same bits on each; may use up its argument."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors laid end to end along the last dimension."""
        ...
