"""Causes of failures that all ranks must share: what one of them could not do, none may count as done."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from engine.model.runtime.rank_group import RankGroup

Agree: TypeAlias = Callable[[list[str]], list[str]]

CAUSE_BYTES = 400  # of each cause, exchanged by ranks


def agreement(group: RankGroup | None = None) -> Agree:
    """A function that makes causes the same on all ranks of a group, which call it together.

    Each rank passes as many, "" for what it could do. Of each the result is the cause of the first rank that has one.
    """
    if group is None:
        return lambda causes: causes
    return lambda causes: _agree(group, causes)


def pack_causes(causes: list[str]) -> torch.Tensor:
    """Causes as numbers, uint8[len(causes), CAUSE_BYTES]; long ones are cut off."""
    packed = torch.zeros(len(causes), CAUSE_BYTES, dtype=torch.uint8)
    for row, cause in zip(packed, causes, strict=True):
        encoded = bytearray(cause.encode(errors="replace")[:CAUSE_BYTES])
        if encoded:
            row[: len(encoded)] = torch.frombuffer(encoded, dtype=torch.uint8)
    return packed


def unpack_cause(packed: NDArray[np.uint8]) -> str:
    """A cause of `pack_causes`."""
    return packed.tobytes().rstrip(b"\0").decode(errors="ignore")


def _agree(group: RankGroup, causes: list[str]) -> list[str]:
    # Each rank writes into a part of its own, so that the sum has the causes of all.
    every = torch.zeros(group.size, len(causes), CAUSE_BYTES, dtype=torch.uint8)
    every[group.rank] = pack_causes(causes)
    found = group.all_reduce(every).numpy()
    return [_first(found[:, number]) for number in range(len(causes))]


def _first(ranks: NDArray[np.uint8]) -> str:
    """Of [ranks, CAUSE_BYTES]: the cause of the first rank that has one; "": none has."""
    return next((cause for cause in map(unpack_cause, ranks) if cause), "")
