"""Faults of encoders end the requests that need the input, not the engine: their causes, which all ranks must share.

The tower is the same on every rank, so a fault usually occurs on all of them. If it occurs on some only (one has no
memory left, say), the others must not use their embeddings: ranks compute the same step with the same numbers.
"""

import logging
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from engine.errors import INTERRUPTS, cause_of
from engine.model.runtime.rank_group import RankGroup

log = logging.getLogger("redline.worker")

Agree: TypeAlias = Callable[[list[str]], list[str]]

CAUSE_BYTES = 400  # of each input, exchanged by ranks


def error_of(encode: Callable[[], None]) -> str:
    """Why an input could not be encoded; empty: it was."""
    try:
        encode()
    except INTERRUPTS:
        raise
    except BaseException as error:
        log.exception("a multimodal input could not be encoded")
        return cause_of(error)
    return ""


def agreement(group: RankGroup | None = None) -> Agree:
    """A function that makes the errors of a step's inputs the same on all ranks of a group, which call it together."""
    if group is None:
        return lambda errors: errors
    return lambda errors: _agree(group, errors)


def _agree(group: RankGroup, errors: list[str]) -> list[str]:
    # Each rank writes into a part of its own, so that the sum has the causes of all.
    causes = torch.zeros(group.size, len(errors), CAUSE_BYTES, dtype=torch.uint8)
    for row, error in zip(causes[group.rank], errors, strict=True):
        cause = bytearray(error.encode(errors="replace")[:CAUSE_BYTES])
        if cause:
            row[: len(cause)] = torch.frombuffer(cause, dtype=torch.uint8)
    every = group.all_reduce(causes).numpy()
    return [_first_cause(every[:, number]) for number in range(len(errors))]


def _first_cause(ranks: NDArray[np.uint8]) -> str:
    """Of an input, [ranks, CAUSE_BYTES]: the cause of the first rank that has one; empty: none has."""
    causes = [cause.tobytes().rstrip(b"\0").decode(errors="ignore") for cause in ranks]
    return next((cause for cause in causes if cause), "")
