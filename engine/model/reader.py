"""Reads stored tensors, a part at a time, into tensors that are there already.

Files aren't mapped into memory: pages of a mapped file count as the process's own for as long as they stay, and a rank
that takes every fourth column would hold all of them.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.model.checkpoint import Stored
from engine.model.dequantise import weight_of
from engine.model.native import Paired, Readable
from engine.model.quantised import Rounded

BAND = 16 << 20  # bytes read at a time


class Reader:
    """Copies parts of stored tensors; keeps the files open until closed."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def copy(self, stored: Readable, begin: tuple[int, ...], to: Tensor) -> None:
        """Fill `to` with the part of the tensor that begins at an index and has the shape of `to`.

        Whole rows of the first dimension are read, BAND bytes at a time, and converted to the dtype of `to`. A weight
        in few bits is computed whole.
        """
        if isinstance(stored, Paired):
            self._copy_paired(stored, begin, to)
            return
        if isinstance(stored, Rounded):
            box = tuple(slice(b, b + n) for b, n in zip(begin, to.shape, strict=True))
            to.copy_(self._weight(stored)[box])
            return
        if not stored.shape:
            to.copy_(next(self._bands(stored, 0, 1))[1][0])
            return
        inner = tuple(slice(b, b + n) for b, n in zip(begin[1:], to.shape[1:], strict=True))
        for first, band in self._bands(stored, begin[0], to.shape[0]):
            to[first : first + len(band)].copy_(band[(slice(None), *inner)])

    def _weight(self, rounded: Rounded) -> Tensor:
        parts = {}
        for end, stored in rounded.parts.items():
            parts[end] = torch.empty(stored.shape, dtype=getattr(torch, stored.kind))
            self.copy(stored, (0,) * len(stored.shape), parts[end])
        return weight_of(parts, rounded.scheme, rounded.shape)

    def _copy_paired(self, paired: Paired, begin: tuple[int, ...], to: Tensor) -> None:
        """Heads are read whole, and of each the rows that are wanted are taken."""
        size, end = paired.head_dim, begin[0] + to.shape[0]
        first = begin[0] // size * size
        count = -(-end // size) * size - first
        inner = tuple(slice(b, b + n) for b, n in zip(begin[1:], to.shape[1:], strict=True))
        if isinstance(paired.of, Rounded):
            bands = iter([(0, self._weight(paired.of)[first : first + count])])
        else:
            bands = self._bands(paired.of, first, count, size)
        for before, band in bands:
            rows = band.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
            at = first + before
            low, high = max(at, begin[0]), min(at + len(rows), end)
            to[low - begin[0] : high - begin[0]].copy_(rows[(slice(low - at, high - at), *inner)])

    def _bands(self, stored: Stored, begin: int, count: int, unit: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Rows begin..begin + count in bands of some units, each with the number of rows before it.

        A band is valid until the next one.
        """
        dtype = getattr(torch, stored.kind)
        inner = stored.shape[1:]
        row = math.prod(inner) * dtype.itemsize
        descriptor = self._open(stored.file)
        rows = max(1, BAND // max(row * unit, 1)) * unit
        for first in range(0, count, rows):
            some = min(rows, count - first)
            buffer = self._take(some * row)
            _read_exactly(
                descriptor, memoryview(buffer.numpy().data), stored.begin + (begin + first) * row, stored.file
            )
            yield first, buffer.view(dtype).view(some, *inner)

    def _take(self, size: int) -> Tensor:
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size]

    def _open(self, file: Path) -> int:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        return self._files[file]


def _read_exactly(descriptor: int, to: memoryview, at: int, file: Path) -> None:
    while len(to):
        count = os.preadv(descriptor, [to], at)
        if count == 0:
            raise OSError(f"{file.name} ended while it was read")
        to, at = to[count:], at + count
