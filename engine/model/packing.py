"""Weights in the layouts of the C++ kernels (see formats.h), plain or quantised."""

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 16  # columns of a panel
# Weights of a group share a scale for each column.
GROUPS = {"int8": 64, "int4": 32}
SCALE_TRIALS = 16  # scales tried for each group of int4
CACHED_NUMBERS = 1 << 18  # quantised at a time: they and what is made of them stay in the processor's caches


@dataclass(frozen=True, slots=True)
class Packed:
    """Panels [panels, words, 16] of 32 bits each; scales [panels, groups, 16] in bfloat16, of quantised weights."""

    panels: Tensor
    scales: Tensor | None = None


def pack(weight: Tensor, kind: str) -> Packed:
    """Pack a weight [outputs, inputs] as float32, bfloat16, int8 or int4."""
    if kind not in GROUPS:
        return Packed(to_panels(weight.to(getattr(torch, kind)).contiguous().view(torch.int32)))
    whole, scales = quantise(weight, kind)
    if kind == "int8":
        words = (whole + 128).to(torch.uint8).view(torch.int32)
    else:
        halves = (whole + 8).to(torch.uint8).view(len(weight), -1, 2, 4)
        words = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1).contiguous().view(torch.int32)
    return Packed(to_panels(words), to_panels(scales))


def to_panels(columns: Tensor) -> Tensor:
    """[outputs, n] as [panels, n, 16], padded with zeros."""
    outputs, n = columns.shape
    missing = -outputs % LANES
    if missing:
        columns = torch.cat((columns, columns.new_zeros(missing, n)))
    return columns.view(-1, LANES, n).transpose(1, 2).contiguous()


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of gate and up in turns of 16."""
    return torch.stack((gate.view(-1, LANES, gate.shape[1]), up.view(-1, LANES, up.shape[1])), 1).flatten(0, 2)


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Whole numbers [outputs, inputs] and scales [outputs, groups] in bfloat16 of a weight [outputs, inputs].

    int8 takes the scale of the largest number. int4 has so few steps that a somewhat smaller range can be better: of
    several scales each group takes the one with the smallest squared error.
    """
    rows = max(1, CACHED_NUMBERS // weight.shape[1])
    whole, scales = zip(*(_quantise(part, kind) for part in weight.split(rows)), strict=True)
    return torch.cat(whole), torch.cat(scales)


def _quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    grouped = weight.float().unflatten(1, (-1, GROUPS[kind]))
    if kind == "int8":
        scale = _in_bf16(grouped.abs().amax(2, keepdim=True) / 127)
        whole = torch.round(grouped / _divisor(scale)).clamp_(-127, 127)
    else:
        # The number that is largest without its sign lands on -8: the range has one step more on that side.
        index = grouped.abs().argmax(2, keepdim=True)
        whole, scale = _best_of(grouped, grouped.gather(2, index) / -8)
    return whole.flatten(1), scale.squeeze(2).to(torch.bfloat16)


def _best_of(grouped: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    best, best_scale = torch.zeros_like(grouped), full
    least = torch.full_like(full, torch.inf)
    for trial in range(SCALE_TRIALS):
        scale = _in_bf16(full * (1.05 - 0.025 * trial))
        whole = torch.round(grouped / _divisor(scale)).clamp_(-8, 7)
        error = (whole * scale - grouped).square_().sum(2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best = torch.where(better, whole, best)
    return best, best_scale


def _in_bf16(scale: Tensor) -> Tensor:
    """As the kernels read it, so that what is divided by it fits what is multiplied with it."""
    return scale.to(torch.bfloat16).float()


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
