"""Weights in the layouts of the C++ kernels (see formats.h), plain or quantised."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LANES = 16  # columns of a panel
# Weights of a group share a scale for each column; those of int4 also their lowest number.
GROUPS = {"int8": 64, "int4": 32}
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range that are tried for int4
CACHED_NUMBERS = 1 << 18  # rounded at a time: they and what is made of them stay in the processor's caches
BAND_NUMBERS = 1 << 21  # packed at a time, so that what lies between a weight and its panels is small


New = Callable[..., Tensor]  # called like torch.empty


class Weight(Protocol):
    """A weight [outputs, inputs] whose rows are asked for in bands; a tensor is one."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Stacked:
    """Weights one below the other."""

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
class InTurns:
    """Rows of gate and up in turns of 16; bands begin and end at multiples of 32."""

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
    """Panels [panels, words, 16] of 32 bits each; scales [panels, groups * scales a group, 16] in bfloat16, if any."""

    panels: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight as whole * scale, + lowest where there is one.

    whole: [outputs, inputs], int8 or, where there is a lowest, uint8; scales, lowest: [outputs, groups] in bfloat16.
    """

    whole: Tensor
    scales: Tensor
    lowest: Tensor | None = None

    def numbers(self) -> Tensor:
        """The weight that this stands for, in float32."""
        found = self.whole.float().unflatten(1, (self.scales.shape[1], -1)) * self.scales.float()[:, :, None]
        if self.lowest is not None:
            found += self.lowest.float()[:, :, None]
        return found.flatten(1)


def pack(weight: Weight, kind: str, new: New = torch.empty) -> Packed:
    """Pack a weight [outputs, inputs] as float32, bfloat16, int8 or int4; `new` makes the tensor for its panels."""
    outputs, inputs = weight.shape
    band = max(1, BAND_NUMBERS // (2 * LANES * inputs)) * 2 * LANES
    packed: list[Tensor] = []
    for first in range(0, outputs, band):
        columns = _columns(weight[first : min(first + band, outputs)], kind)
        if not packed:
            makers: tuple[New, New] = new, torch.empty
            packed = [_panels(outputs, some, make) for some, make in zip(columns, makers, strict=False)]
        for panels, some in zip(packed, columns, strict=True):
            _put(panels, first // LANES, some)
    return Packed(*packed)


def _columns(weight: Tensor, kind: str) -> list[Tensor]:
    """What panels are made of, [outputs, n] each: words of 32 bits, and scales if there are any."""
    if kind not in GROUPS:
        return [weight.to(getattr(torch, kind)).contiguous().view(torch.int32)]
    rounded = quantise(weight, kind)
    if rounded.lowest is None:
        return [(rounded.whole.view(torch.uint8) ^ 0x80).view(torch.int32), rounded.scales]  # -128 becomes 0
    halves = rounded.whole.view(len(weight), -1, 2, 4)
    words = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1).contiguous().view(torch.int32)
    return [words, torch.stack((rounded.scales, rounded.lowest), 2).flatten(1)]


def to_panels(columns: Tensor) -> Tensor:
    """[outputs, n] as [panels, n, 16], padded with zeros."""
    panels = _panels(len(columns), columns, torch.empty)
    _put(panels, 0, columns)
    return panels


def _panels(outputs: int, columns: Tensor, new: New) -> Tensor:
    return new((-(-outputs // LANES), columns.shape[1], LANES), dtype=columns.dtype)


def _put(panels: Tensor, at: int, columns: Tensor) -> None:
    """Write columns into panels from the panel `at` on, the last one filled up with zeros."""
    outputs, n = columns.shape
    full, rest = divmod(outputs, LANES)
    panels[at : at + full] = columns[: full * LANES].view(full, LANES, n).transpose(1, 2)
    if rest:
        panels[at + full] = 0
        panels[at + full, :, :rest] = columns[full * LANES :].T


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows of gate and up in turns of 16."""
    return torch.stack((gate.view(-1, LANES, gate.shape[1]), up.view(-1, LANES, up.shape[1])), 1).flatten(0, 2)


def quantise(weight: Tensor, kind: str) -> Rounded:
    """Round a weight [outputs, inputs].

    int8 takes the scale of a group's largest number. int4, 0 to 15 above the lowest number, has so few steps that a
    somewhat smaller range can be better: of several each group takes the one with the smallest squared error.
    """
    outputs, inputs = weight.shape
    rows = max(1, CACHED_NUMBERS // inputs)
    some, dtype, count = (_int8, torch.int8, 1) if kind == "int8" else (_int4, torch.uint8, 2)
    whole = torch.empty(outputs, inputs, dtype=dtype)
    of_groups = [torch.empty(outputs, inputs // GROUPS[kind], dtype=torch.bfloat16) for _ in range(count)]
    for first in range(0, outputs, rows):
        here = slice(first, first + rows)
        found, *values = some(weight[here].float().unflatten(1, (-1, GROUPS[kind])))
        whole[here] = found.flatten(1)
        for to, value in zip(of_groups, values, strict=True):
            to[here] = value.squeeze(2)
    return Rounded(whole, *of_groups)


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
        whole = torch.round((grouped - begin) / _divisor(scale)).clamp_(0, 15)
        error = (whole * scale + begin - grouped).square_().sum(2, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_lowest = torch.where(better, scale, best_scale), torch.where(better, begin, best_lowest)
        best = torch.where(better, whole, best)
    return best, best_scale, best_lowest


def _in_bf16(scale: Tensor) -> Tensor:
    """As the kernels read it, so that what is divided by it fits what is multiplied with it."""
    return scale.to(torch.bfloat16).float()


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
