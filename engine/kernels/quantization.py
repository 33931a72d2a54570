"""Quantizes weights to int8 and int4, in groups of inputs: the rounding that all devices share."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Inputs per quantization group. A group of an output has a scale; int4 also stores its minimum.
GROUPS = {"int8": 64, "int4": 32}
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # fractions of a group's range that are tried for int4
CACHED_ELEMENTS = 1 << 18  # quantized at a time, so that all intermediates stay in the CPU's caches


@dataclass(frozen=True, slots=True)
class GroupQuantized:
    """A weight as integers * scales, + minimums for int4."""

    integers: Tensor  # [outputs, inputs]; int8, or uint8 for int4
    scales: Tensor  # bfloat16 [outputs, groups]
    minimums: Tensor | None = None  # bfloat16 [outputs, groups], for int4

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        found = self.integers.float().unflatten(1, (self.scales.shape[1], -1)) * self.scales.float()[:, :, None]
        if self.minimums is not None:
            found += self.minimums.float()[:, :, None]
        return found.flatten(1)


def quantize(weight: Tensor, kind: str, elements: int = CACHED_ELEMENTS) -> GroupQuantized:
    """Quantize a weight [outputs, inputs] in groups of inputs, where it is.

    int8 is symmetric: the scale is the group's largest magnitude / 127. int4 is 0 to 15 steps above a minimum. With so
    few steps a smaller range than the group's can be better, so each group takes the one of SHRINKS with the smallest
    squared error.

    Args:
        kind: int8 or int4.
        elements: quantized at a time.
    """
    outputs, inputs = weight.shape
    rows = max(1, elements // inputs)
    quantize_group, dtype, count = (_int8, torch.int8, 1) if kind == "int8" else (_int4, torch.uint8, 2)
    integers = weight.new_empty((outputs, inputs), dtype=dtype)
    of_groups = [weight.new_empty((outputs, inputs // GROUPS[kind]), dtype=torch.bfloat16) for _ in range(count)]
    for first in range(0, outputs, rows):
        here = slice(first, first + rows)
        found, *values = quantize_group(weight[here].float().unflatten(1, (-1, GROUPS[kind])))
        integers[here] = found.flatten(1)
        for to, value in zip(of_groups, values, strict=True):
            to[here] = value.squeeze(2)
    return GroupQuantized(integers, *of_groups)


def _int8(grouped: Tensor) -> tuple[Tensor, Tensor]:
    scale = _in_bf16(grouped.abs().amax(2, keepdim=True) / 127)
    return torch.round(grouped / _divisor(scale)).clamp_(-127, 127), scale


def _int4(grouped: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lowest, highest = grouped.aminmax(dim=2, keepdim=True)
    middle, reach = (highest + lowest) / 2, (highest - lowest) / 2
    best, best_scale, best_lowest = torch.zeros_like(grouped), reach, middle
    least = torch.full_like(reach, torch.inf)
    for shrink in SHRINKS:
        scale, begin = _in_bf16(shrink * reach / 7.5), _in_bf16(middle - shrink * reach)
        integers = torch.round((grouped - begin) / _divisor(scale)).clamp_(0, 15)
        error = (integers * scale + begin - grouped).square_().sum(2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_lowest = torch.where(better, scale, best_scale), torch.where(better, begin, best_lowest)
        best = torch.where(better, integers, best)
    return best, best_scale, best_lowest


def _in_bf16(scale: Tensor) -> Tensor:
    """The scale as the kernels read it, so that quantizing divides by the number that they multiply with."""
    return scale.to(torch.bfloat16).float()


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
