"""Torch implementation of masks over the vocabulary, for devices without Triton."""

import torch
from torch import Tensor

from engine.grammar import WORD_BITS


def exclude_tokens(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """Set the logits of the tokens whose bits are not set to -inf, in place.

    Args:
        logits: [n, vocabulary].
        rows: int32[m], different rows of the logits.
        words: int32[m, words], a mask for each of `rows`: a bit for each token, the first in the lowest bit of a word.
    """
    token = torch.arange(logits.shape[1], device=logits.device)
    allowed = words[:, token // WORD_BITS] >> (token % WORD_BITS).int() & 1
    at = rows.long()
    logits.index_copy_(0, at, logits[at].masked_fill(allowed == 0, -torch.inf))
