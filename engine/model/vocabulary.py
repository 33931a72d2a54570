"""A vocabulary divided among ranks: each embeds its own tokens and computes their logits, and they choose together.

What they exchange to choose are three numbers a row, and a fourth for rows that draw; only rows whose logits are asked
for gather them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.model.group import Group

MIN_TEMPERATURE = 1e-6  # below it float32 can't tell the likeliest token from greedy

Float64s = NDArray[np.float64]
Int64s = NDArray[np.int64]


def share_of(total: int, rank: int, size: int) -> tuple[int, int]:
    """The first of a rank's tokens, and how many it has."""
    each, more = divmod(total, size)
    return rank * each + min(rank, more), each + (rank < more)


@dataclass(frozen=True, slots=True)
class Slice:
    """A rank's tokens of `total`; where they don't divide, the first ranks have one more."""

    total: int
    group: Group

    @property
    def first(self) -> int:
        return share_of(self.total, self.group.rank, self.group.size)[0]

    @property
    def count(self) -> int:
        return share_of(self.total, self.group.rank, self.group.size)[1]

    def gather(self, logits: Tensor) -> Tensor:
        """The ranks' logits [rows, count] as [rows, total]."""
        size = self.group.size
        if self.total % size == 0:
            return self.group.all_gather(logits)
        most = self.total // size + 1
        gathered = self.group.all_gather(nn.functional.pad(logits, (0, most - logits.shape[1]))).split(most, -1)
        return torch.cat([gathered[rank][:, : share_of(self.total, rank, size)[1]] for rank in range(size)], -1)

    def choose(
        self,
        best: tuple[NDArray[np.floating], NDArray[np.integer], NDArray[np.floating]],
        temperatures: NDArray[np.float32],
        numbers: Float64s,
        draw: Callable[[Int64s, Float64s], NDArray[np.integer]],
    ) -> Int64s:
        """A token for each row, the same on every rank.

        best: of the rank's tokens the highest logit, which one it is, and what all of them weigh against it at the
        row's temperature. draw: given rows and numbers in [0, 1), draws one of the rank's own tokens for each.
        """
        size, rows = self.group.size, len(temperatures)
        tops, tokens, weights = best
        mine = np.stack((tops.astype(np.float64), tokens + float(self.first), weights.astype(np.float64)))
        all_of_them = self.group.all_gather(torch.from_numpy(mine).reshape(1, -1)).numpy().reshape(size, 3, rows)
        highest, found_at, weighed = all_of_them[:, 0], all_of_them[:, 1], all_of_them[:, 2]
        chosen = found_at[highest.argmax(0), np.arange(rows)].astype(np.int64)
        drawn = np.flatnonzero(temperatures)
        if len(drawn):
            owners, inner = _owners(highest[:, drawn], weighed[:, drawn], temperatures[drawn], numbers[drawn])
            own = np.flatnonzero(owners == self.group.rank)
            found = torch.zeros(len(drawn), dtype=torch.int64)
            if len(own):
                tokens_here = draw(drawn[own], inner[own]).astype(np.int64) + self.first
                found[torch.from_numpy(own)] = torch.from_numpy(tokens_here)
            chosen[drawn] = self.group.all_reduce(found).numpy()
        return chosen


def _owners(
    tops: Float64s, weights: Float64s, temperatures: NDArray[np.float32], numbers: Float64s
) -> tuple[Int64s, Float64s]:
    """Which rank has the token that a number in [0, 1) falls on, and the number within that rank's tokens.

    tops, weights: [ranks, rows].
    """
    speed = 1 / np.maximum(temperatures.astype(np.float64), MIN_TEMPERATURE)
    shares = weights * np.exp((tops - tops.max(0)) * speed)
    edges = shares.cumsum(0)
    target = numbers * edges[-1]
    last = len(shares) - 1 - (shares[::-1] > 0).argmax(0)  # rounding must not lead past what can be drawn
    owners = np.minimum((edges <= target).sum(0), last)
    rows = np.arange(len(numbers))
    own = shares[owners, rows]
    inner = (target - (edges[owners, rows] - own)) / own
    return owners, np.clip(np.nan_to_num(inner), 0.0, np.nextafter(1.0, 0.0))


def divide_embedding(embedding: nn.Module, part: Slice) -> None:
    """Make an embedding that has its slice of the rows look up the tokens of all ranks."""
    missing: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids = inputs[0] - part.first
        outside = (ids < 0) | (ids >= part.count)
        missing.append(outside)
        return (ids.masked_fill(outside, 0), *inputs[1:])

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return part.group.all_reduce(output.masked_fill(missing.pop()[..., None], 0))

    embedding.register_forward_pre_hook(before)
    embedding.register_forward_hook(after)
