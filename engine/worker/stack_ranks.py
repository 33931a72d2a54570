"""What tensor-parallel ranks exchange while they compute the stack in Triton; with one rank nothing."""

from typing import Protocol

from torch import Tensor
from torch.nn import functional

from engine.model.runtime.vocab_shard import VocabShard


class StackRanks(Protocol):
    """All calls may be captured."""

    def embed(self, ids: Tensor, embedding: Tensor) -> Tensor:
        """The embeddings of tokens: [tokens, hidden].

        Args:
            ids: int32[tokens], of the whole vocabulary.
            embedding: [tokens of this rank, hidden].
        """
        ...

    def reduce(self, part: Tensor) -> Tensor:
        """The sum over ranks of a product whose inputs are divided; may overwrite it."""
        ...


class OneRank:
    """Implements `StackRanks`."""

    def embed(self, ids: Tensor, embedding: Tensor) -> Tensor:
        return functional.embedding(ids, embedding)

    def reduce(self, part: Tensor) -> Tensor:
        return part


class SeveralRanks:
    """Implements `StackRanks`."""

    def __init__(self, shard: VocabShard):
        self._shard = shard
        self._first, self._count = shard.first, shard.count

    def embed(self, ids: Tensor, embedding: Tensor) -> Tensor:
        own = ids - self._first
        outside = (own < 0) | (own >= self._count)
        found = functional.embedding(own.masked_fill(outside, 0), embedding)
        return self._shard.group.all_reduce(found.masked_fill(outside[:, None], 0))

    def reduce(self, part: Tensor) -> Tensor:
        return self._shard.group.all_reduce(part)


def make_stack_ranks(shard: VocabShard | None) -> StackRanks:
    """`shard`: of the rank; None with one rank."""
    return OneRank() if shard is None else SeveralRanks(shard)
