"""Packs weights into the layouts of the C++ kernels (see formats.h), plain or quantized."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LANES = 16  # columns of a panel
# Inputs per quantization group. A group of a column has a scale; int4 also stores its minimum.
GROUPS = {"int8": 64, "int4": 32}
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # fractions of a group's range that are tried for int4
CACHED_ELEMENTS = 1 << 18  # quantized at a time, so that all intermediates stay in the CPU's caches
BAND_ELEMENTS = 1 << 21  # packed at a time, to keep the memory between a weight and its panels small


Empty = Callable[..., Tensor]  # called like torch.empty


class Weight(Protocol):
    """A weight [outputs, inputs] that is read in bands of rows. A tensor is one."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Concatenated:
    """Weights of the same inputs, one below the other."""

    parts: Sequence[Tensor]

    @property
    def shape(self) -> Sequence[int]:
        return sum(map(len, self.parts)), self.parts[0].shape[1]

    def __getitem__(self, rows: slice, /) -> Tensor:
        begins = itertools.accumulate(map(len, self.parts), initial=0)
        pieces = [
            part[max(0, rows.start - begin) : max(0, rows.stop - begin)]
            for part, begin in zip(self.parts, begins, strict=False)
        ]
        return torch.cat(pieces)


@dataclass(frozen=True, slots=True)
class Interleaved:
    """16 rows of gate, 16 of up, and so on. Bands begin and end at multiples of 32."""

    gate: Tensor
    up: Tensor

    @property
    def shape(self) -> Sequence[int]:
        return 2 * len(self.gate), self.gate.shape[1]

    def __getitem__(self, rows: slice, /) -> Tensor:
        half = slice(rows.start // 2, rows.stop // 2)
        return interleave(self.gate[half], self.up[half])


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as the kernels read it."""

    panels: Tensor  # 32-bit words [panels, words, 16]
    scales: Tensor | None = None  # of a quantized weight: bfloat16 [panels, groups * scales per group, 16]


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


def pack(weight: Weight, kind: str, empty: Empty = torch.empty) -> Packed:
    """Pack a weight [outputs, inputs] as float32, bfloat16, int8 or int4. `empty` allocates its panels."""
    outputs, inputs = weight.shape
    band = max(1, BAND_ELEMENTS // (2 * LANES * inputs)) * 2 * LANES
    packed: list[Tensor] = []
    for first in range(0, outputs, band):
        columns = _columns(weight[first : min(first + band, outputs)], kind)
        if not packed:
            allocators: tuple[Empty, Empty] = empty, torch.empty
            packed = [_panels(outputs, some, allocate) for some, allocate in zip(columns, allocators, strict=False)]
        for panels, some in zip(packed, columns, strict=True):
            _put(panels, first // LANES, some)
    return Packed(*packed)


def _columns(weight: Tensor, kind: str) -> list[Tensor]:
    """The contents of the panels, [outputs, n] each: 32-bit words, and the scales of a quantized weight."""
    if kind not in GROUPS:
        return [weight.to(getattr(torch, kind)).contiguous().view(torch.int32)]
    quantized = quantize(weight, kind)
    if quantized.minimums is None:
        return [(quantized.integers.view(torch.uint8) ^ 0x80).view(torch.int32), quantized.scales]  # -128 becomes 0
    halves = quantized.integers.view(len(weight), -1, 2, 4)
    words = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1).contiguous().view(torch.int32)
    return [words, torch.stack((quantized.scales, quantized.minimums), 2).flatten(1)]


def to_panels(columns: Tensor) -> Tensor:
    """Lay out [outputs, n] as [panels, n, 16], padded with zeros."""
    panels = _panels(len(columns), columns, torch.empty)
    _put(panels, 0, columns)
    return panels


def _panels(outputs: int, columns: Tensor, empty: Empty) -> Tensor:
    return empty((-(-outputs // LANES), columns.shape[1], LANES), dtype=columns.dtype)


def _put(panels: Tensor, at: int, columns: Tensor) -> None:
    """Write columns into panels from panel `at` on, and pad the last one with zeros."""
    outputs, n = columns.shape
    full, rest = divmod(outputs, LANES)
    panels[at : at + full] = columns[: full * LANES].view(full, LANES, n).transpose(1, 2)
    if rest:
        panels[at + full] = 0
        panels[at + full, :, :rest] = columns[full * LANES :].T


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """16 rows of gate, 16 of up, and so on."""
    return torch.stack((gate.view(-1, LANES, gate.shape[1]), up.view(-1, LANES, up.shape[1])), 1).flatten(0, 2)


def quantize(weight: Tensor, kind: str) -> GroupQuantized:
    """Quantize a weight [outputs, inputs] in groups of inputs.

    int8 is symmetric: the scale is the group's largest magnitude / 127. int4 is 0 to 15 steps above a minimum. With so
    few steps a smaller range than the group's can be better, so each group takes the one of SHRINKS with the smallest
    squared error.
    """
    outputs, inputs = weight.shape
    rows = max(1, CACHED_ELEMENTS // inputs)
    quantize_group, dtype, count = (_int8, torch.int8, 1) if kind == "int8" else (_int4, torch.uint8, 2)
    integers = torch.empty(outputs, inputs, dtype=dtype)
    of_groups = [torch.empty(outputs, inputs // GROUPS[kind], dtype=torch.bfloat16) for _ in range(count)]
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
