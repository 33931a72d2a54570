"""The tensor-parallel ranks that run a model together."""

from typing import Protocol

from torch import Tensor


class RankGroup(Protocol):
    """Collective operations. All ranks make the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, bit-identical on each; may overwrite its argument."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, concatenated along the last dimension."""
        ...

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers; waits for all ranks."""
        ...
