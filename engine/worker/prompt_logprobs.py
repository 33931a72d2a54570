"""Logprobs of prompt tokens, for requests that request them.

The token at a position is scored with the logits of the position before. Positions are scored in parts, since the
logits of a whole chunk would take as much memory as everything else in a step.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Int64s
from engine.columns import column
from engine.logprob_columns import PromptLogprobs, TokenLogprobs
from engine.worker.slots import StepBatch, WorkerSlots

PART = 64  # positions whose logits are in memory at a time


class HasLogits(Protocol):
    """The part of a ModelBackend that scoring needs."""

    def logits(self, which: Int64s) -> Tensor: ...


def parts(batch: StepBatch) -> Iterator[Int64s]:
    """The entries of `batch.logits_at` that are scored, in parts. All ranks must compute the same parts."""
    first, count = len(batch.sampled_at), len(batch.scored_at)
    for begin in range(0, count, PART):
        yield np.arange(first + begin, first + min(begin + PART, count))


def score(backend: HasLogits, batch: StepBatch, slots: WorkerSlots) -> tuple[PromptLogprobs, ...]:
    """The logprobs of the prompt tokens after `batch.scored_at`, one entry per slot that has any."""
    at = batch.scored_at
    owners, positions = batch.slots[batch.row_of[at]], batch.positions[at] + 1
    tokens = torch.from_numpy(slots.tokens[owners, positions].astype(np.int64))
    requested = {slot: slots.sampling[slot].prompt_logprobs for slot in np.unique(owners).tolist()}
    found = [
        _score_part(backend.logits(which), tokens[which - len(batch.sampled_at)], max(requested.values()))
        for which in parts(batch)
    ]
    ids, values, ranks = (np.concatenate(each) for each in zip(*found, strict=True))
    return tuple(
        PromptLogprobs(
            slot,
            int(slots.generation[slot]),
            _pack(positions[mine], ids[mine, : top + 1], values[mine, : top + 1], ranks[mine]),
        )
        for slot, top in requested.items()
        for mine in (owners == slot,)
    )


def _score_part(logits: Tensor, tokens: Tensor, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and logprobs [positions, 1 + top] with the prompt's token first, and the rank of that token."""
    logprobs = torch.log_softmax(logits.float(), -1)
    last = logprobs.shape[-1] - 1
    own = logprobs.gather(-1, tokens.clamp(max=last)[:, None])
    own[tokens > last] = -torch.inf  # tokens that stand for inputs only
    ranks = (logprobs > own).sum(-1) + 1
    best = torch.topk(logprobs, min(top, logprobs.shape[-1]), -1)
    ids, values = torch.cat((tokens[:, None], best.indices), -1), torch.cat((own, best.values), -1)
    return ids.numpy(), values.numpy(), ranks.numpy()


def _pack(positions: Int64s, ids: np.ndarray, values: np.ndarray, ranks: np.ndarray) -> TokenLogprobs:
    return TokenLogprobs(ids.shape[1], column(positions), column(ids), column(values, "<f4"), column(ranks))
