"""A vocabulary that is divided among ranks: each embeds its own tokens and computes their logits.

To choose tokens, ranks exchange three numbers per row of the batch, and a fourth for rows that are sampled at a
temperature. Logits are gathered only for rows that need them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.arrays import Float64s, Int64s
from engine.model.runtime.rank_group import RankGroup

MIN_TEMPERATURE = 1e-6  # below it sampling in float32 equals greedy


def vocab_range(total: int, rank: int, size: int) -> tuple[int, int]:
    """A rank's first token, and its number of tokens. If `total` is not divisible, the first ranks have one more."""
    each, more = divmod(total, size)
    return rank * each + min(rank, more), each + (rank < more)


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The tokens of one rank, out of `total`."""

    total: int
    group: RankGroup

    @property
    def first(self) -> int:
        return vocab_range(self.total, self.group.rank, self.group.size)[0]

    @property
    def count(self) -> int:
        return vocab_range(self.total, self.group.rank, self.group.size)[1]

    def gather(self, logits: Tensor) -> Tensor:
        """Gather the ranks' logits [rows, count] to [rows, total]."""
        size = self.group.size
        if self.total % size == 0:
            return self.group.all_gather(logits)
        most = self.total // size + 1
        gathered = self.group.all_gather(nn.functional.pad(logits, (0, most - logits.shape[1]))).split(most, -1)
        return torch.cat([gathered[rank][:, : vocab_range(self.total, rank, size)[1]] for rank in range(size)], -1)

    def choose(
        self,
        best: tuple[NDArray[np.floating], NDArray[np.integer], NDArray[np.floating]],
        temperatures: NDArray[np.float32],
        numbers: Float64s,
        draw: Callable[[Int64s, Float64s], NDArray[np.integer]],
    ) -> Int64s:
        """Choose a token for each row, the same on every rank.

        A rank is drawn first, in proportion to the probability of its tokens; that rank then draws one of them.

        Args:
            best: for each row, over this rank's tokens: highest logit, its token, and the sum of
                exp((logit - highest) / temperature).
            temperatures: [rows]; 0 for greedy.
            numbers: [rows], uniform in [0, 1).
            draw: called with rows and a number in [0, 1) for each; draws one of this rank's tokens per row.
        """
        size, rows = self.group.size, len(temperatures)
        tops, tokens, weights = best
        mine = np.stack((tops.astype(np.float64), tokens + float(self.first), weights.astype(np.float64)))
        gathered = self.group.all_gather(torch.from_numpy(mine).reshape(1, -1)).numpy().reshape(size, 3, rows)
        all_tops, all_tokens, all_weights = gathered[:, 0], gathered[:, 1], gathered[:, 2]
        chosen = all_tokens[all_tops.argmax(0), np.arange(rows)].astype(np.int64)
        drawn = np.flatnonzero(temperatures)
        if len(drawn):
            owners, inner = _owners(all_tops[:, drawn], all_weights[:, drawn], temperatures[drawn], numbers[drawn])
            own = np.flatnonzero(owners == self.group.rank)
            found = torch.zeros(len(drawn), dtype=torch.int64)
            if len(own):
                own_tokens = draw(drawn[own], inner[own]).astype(np.int64) + self.first
                found[torch.from_numpy(own)] = torch.from_numpy(own_tokens)
            chosen[drawn] = self.group.all_reduce(found).numpy()
        return chosen


def _owners(
    tops: Float64s, weights: Float64s, temperatures: NDArray[np.float32], numbers: Float64s
) -> tuple[Int64s, Float64s]:
    """The rank that draws each row's token, and the number in [0, 1) that it draws with.

    The probabilities of all ranks lie end to end; the row's number falls into the interval of one rank, and its
    position within that interval is the new number. With two ranks of probability 0.25 and 0.75, the number 0.4 selects
    rank 1 and becomes (0.4 - 0.25) / 0.75 = 0.2.

    Args:
        tops, weights: [ranks, rows], as `best` of `VocabShard.choose`.
        temperatures, numbers: [rows].
    """
    speed = 1 / np.maximum(temperatures.astype(np.float64), MIN_TEMPERATURE)
    shares = weights * np.exp((tops - tops.max(0)) * speed)
    edges = shares.cumsum(0)
    target = numbers * edges[-1]
    last = len(shares) - 1 - (shares[::-1] > 0).argmax(0)  # rounding must not select a rank of probability 0
    owners = np.minimum((edges <= target).sum(0), last)
    rows = np.arange(len(numbers))
    own = shares[owners, rows]
    inner = (target - (edges[owners, rows] - own)) / own
    return owners, np.clip(np.nan_to_num(inner), 0.0, np.nextafter(1.0, 0.0))


def shard_embedding(embedding: nn.Module, shard: VocabShard) -> None:
    """Make an embedding that holds only this rank's tokens return the embeddings of all tokens."""
    outside_masks: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids = inputs[0] - shard.first
        outside = (ids < 0) | (ids >= shard.count)
        outside_masks.append(outside)
        return (ids.masked_fill(outside, 0), *inputs[1:])

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return shard.group.all_reduce(output.masked_fill(outside_masks.pop()[..., None], 0))

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after)
