"""Which of a token's three positions (M-RoPE: 0 time, 1 height, 2 width) rotates which dims."""

from typing import Any

import torch
from torch import Tensor


def rotary_axes(rotary: Any) -> Tensor:
    """The axis of each pair of dims of a rotary embedding of transformers: int32[pairs]; zeros without M-RoPE.

    The class itself arranges the numbers 0, 1 and 2 as it arranges the angles of the three positions.
    """
    pairs = len(rotary.inv_freq)
    if not hasattr(rotary, "recomposition_frequencies"):
        return torch.zeros(pairs, dtype=torch.int32)
    axes = torch.arange(3, dtype=torch.int32).view(3, 1, 1, 1).expand(3, 1, 1, pairs).contiguous()
    arranged: Tensor = rotary.recomposition_frequencies(axes)
    return arranged[0, 0, :pairs].contiguous()


def uses_mrope(decoder: Any) -> bool:
    """Whether a decoder takes three rotary positions for each token."""
    return hasattr(getattr(decoder.base_model, "rotary_emb", None), "recomposition_frequencies")


def sections(axes: Tensor) -> tuple[tuple[int, int, int], bool] | None:
    """How many pairs each axis has, and whether the axes take turns; None for an arrangement of another kind.

    Example of 8 pairs with 4, 2 and 2 for the axes:

        one after the other   0 0 0 0 1 1 2 2     Qwen2-VL
        in turns              0 1 2 0 1 2 0 0     Qwen3-VL
    """
    counts = [int((axes == axis).sum()) for axis in range(3)]
    pair = torch.arange(len(axes))
    turns = torch.zeros_like(axes)
    for axis in (1, 2):
        turns[(pair % 3 == axis) & (pair < 3 * counts[axis])] = axis
    one_by_one = torch.repeat_interleave(torch.arange(3, dtype=axes.dtype), torch.tensor(counts))
    found = (counts[0], counts[1], counts[2])
    if torch.equal(axes, one_by_one):
        return found, False
    return (found, True) if torch.equal(axes, turns) else None
