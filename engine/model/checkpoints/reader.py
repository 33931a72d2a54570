"""Reads parts of stored tensors into existing tensors.

Files are not memory-mapped: pages of a mapped file count as the process's own as long as they stay resident, and a
rank that reads every fourth column would hold all of them.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.model.checkpoints.dequantize import dequantize
from engine.model.checkpoints.mistral_tensors import CheckpointTensor, InterleavedRows
from engine.model.checkpoints.quantized import QuantizedWeight
from engine.model.checkpoints.safetensors_headers import StoredTensor

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

    def copy(self, source: CheckpointTensor, begin: tuple[int, ...], out: Tensor) -> None:
        """Fill `out` with the part of `source` that starts at the index `begin` and has the shape of `out`.

        Whole rows of the first dimension are read, BAND bytes at a time, and converted to the dtype of `out`.
        A quantized weight is always dequantized as a whole.
        """
        if isinstance(source, InterleavedRows):
            self._copy_interleaved(source, begin, out)
            return
        if isinstance(source, QuantizedWeight):
            box = tuple(slice(b, b + n) for b, n in zip(begin, out.shape, strict=True))
            out.copy_(self._dequantize(source)[box])
            return
        if not source.shape:
            out.copy_(next(self._bands(source, 0, 1))[1][0])
            return
        inner = tuple(slice(b, b + n) for b, n in zip(begin[1:], out.shape[1:], strict=True))
        for first, band in self._bands(source, begin[0], out.shape[0]):
            out[first : first + len(band)].copy_(band[(slice(None), *inner)])

    def _dequantize(self, weight: QuantizedWeight) -> Tensor:
        parts = {}
        for suffix, stored in weight.parts.items():
            parts[suffix] = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
            self.copy(stored, (0,) * len(stored.shape), parts[suffix])
        return dequantize(parts, weight.scheme, weight.shape)

    def _copy_interleaved(self, source: InterleavedRows, begin: tuple[int, ...], out: Tensor) -> None:
        """Read whole heads, reorder their rows, and copy the rows that belong to the part."""
        size, end = source.head_dim, begin[0] + out.shape[0]
        first = begin[0] // size * size
        count = -(-end // size) * size - first
        inner = tuple(slice(b, b + n) for b, n in zip(begin[1:], out.shape[1:], strict=True))
        if isinstance(source.inner, QuantizedWeight):
            bands = iter([(0, self._dequantize(source.inner)[first : first + count])])
        else:
            bands = self._bands(source.inner, first, count, size)
        for before, band in bands:
            rows = band.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)
            at = first + before
            low, high = max(at, begin[0]), min(at + len(rows), end)
            out[low - begin[0] : high - begin[0]].copy_(rows[(slice(low - at, high - at), *inner)])

    def _bands(self, stored: StoredTensor, begin: int, count: int, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Read rows begin..begin + count in bands, each with the number of rows before it.

        Bands have a multiple of `multiple` rows. A band is valid until the next one is read.
        """
        dtype = getattr(torch, stored.dtype)
        inner = stored.shape[1:]
        row = math.prod(inner) * dtype.itemsize
        descriptor = self._open(stored.file)
        rows = max(1, BAND // max(row * multiple, 1)) * multiple
        for first in range(0, count, rows):
            some = min(rows, count - first)
            buffer = self._take(some * row)
            _read_exactly(
                descriptor, memoryview(buffer.numpy().data), stored.offset + (begin + first) * row, stored.file
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


def _read_exactly(descriptor: int, out: memoryview, offset: int, file: Path) -> None:
    while len(out):
        count = os.preadv(descriptor, [out], offset)
        if count == 0:
            raise OSError(f"{file.name} ended while it was read")
        out, offset = out[count:], offset + count
