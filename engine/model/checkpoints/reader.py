"""Reads parts of stored tensors into existing tensors.

Files are not memory-mapped: pages of a mapped file count as the process's own as long as they stay resident, and a
rank that reads every fourth column would hold all of them.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.model.checkpoints.dequantize import dequantize
from engine.model.checkpoints.mistral_tensors import CheckpointTensor, InterleavedRows
from engine.model.checkpoints.quantized import QuantizedWeight
from engine.model.checkpoints.safetensors_headers import StoredTensor
from engine.model.checkpoints.weight_memory import WeightMemory, host_memory

BAND = 16 << 20  # bytes read at a time


class Reader:
    """Copies parts of stored tensors; keeps the files open until closed.

    `memory`: has the tensors that are filled.
    """

    def __init__(self, memory: WeightMemory | None = None) -> None:
        self._files: dict[Path, int] = {}
        self.memory: WeightMemory = memory or host_memory()

    def close(self) -> None:
        """Close the files, and free the buffers."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self.memory = host_memory()

    def copy(self, source: CheckpointTensor, begin: tuple[int, ...], out: Tensor) -> None:
        """Fill `out` with the part of `source` that starts at the index `begin` and has the shape of `out`.

        Whole rows of the first dimension are read, BAND bytes at a time, and converted to the dtype of `out`.
        A quantized weight is always dequantized as a whole, on the host.
        """
        if isinstance(source, InterleavedRows):
            self._copy_interleaved(source, begin, out)
        elif isinstance(source, QuantizedWeight):
            box = tuple(slice(b, b + n) for b, n in zip(begin, out.shape, strict=True))
            self.memory.load(out, self._dequantize(source)[box])
        else:
            self._copy_stored(source, begin, out, self.memory.load)

    def _copy_stored(
        self, stored: StoredTensor, begin: tuple[int, ...], out: Tensor, load: Callable[[Tensor, Tensor], object]
    ) -> None:
        if not stored.shape:
            load(out, next(self._bands(stored, 0, 1))[1][0])
            return
        inner = tuple(slice(b, b + n) for b, n in zip(begin[1:], out.shape[1:], strict=True))
        for first, band in self._bands(stored, begin[0], out.shape[0]):
            load(out[first : first + len(band)], band[(slice(None), *inner)])

    def _dequantize(self, weight: QuantizedWeight) -> Tensor:
        parts = {}
        for suffix, stored in weight.parts.items():
            parts[suffix] = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
            self._copy_stored(stored, (0,) * len(stored.shape), parts[suffix], Tensor.copy_)
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
            self.memory.load(out[low - begin[0] : high - begin[0]], rows[(slice(low - at, high - at), *inner)])

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
            buffer = self.memory.band(some * row)
            _read_exactly(
                descriptor, memoryview(buffer.numpy().data), stored.offset + (begin + first) * row, stored.file
            )
            yield first, buffer.view(dtype).view(some, *inner)

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
