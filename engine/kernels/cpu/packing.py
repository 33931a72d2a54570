"""Packs weights into the layouts of the C++ kernels (see formats.h), plain or quantized."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.quantization import GROUPS, quantize

LANES = 16  # columns of a panel
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


def pack(weight: Weight, kind: str, empty: Empty = torch.empty) -> Packed:
    """Pack a weight [outputs, inputs] as float32, bfloat16, int8 or int4. `empty` allocates its panels."""
    packed: list[Tensor] = []
    first = 0
    for band in bands(weight):
        columns = _columns(band, kind)
        if not packed:
            allocators: tuple[Empty, Empty] = empty, torch.empty
            packed = [
                _panels(weight.shape[0], some, allocate) for some, allocate in zip(columns, allocators, strict=False)
            ]
        for panels, some in zip(packed, columns, strict=True):
            _put(panels, first // LANES, some)
        first += len(band)
    return Packed(*packed)


def bands(weight: Weight) -> Iterator[Tensor]:
    """The rows of a weight in pieces, each of whole pairs of panels but the last one."""
    outputs, inputs = weight.shape
    rows = max(1, BAND_ELEMENTS // (2 * LANES * inputs)) * 2 * LANES
    for first in range(0, outputs, rows):
        yield weight[first : min(first + rows, outputs)]


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
