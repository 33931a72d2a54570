"""Memory in huge pages: a step reads all weights and much of the KV cache, page after page."""

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ALIGNMENT = 64


def lazy_zeros(size: int) -> np.ndarray:
    """Zeros, uint8[size or more], at a multiple of 64. Pages are allocated on first use, huge ones if possible."""
    size = -(-max(size, 1) // HUGE_PAGE) * HUGE_PAGE  # other sizes are not placed where huge pages begin
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)


class Arena:
    """Allocates aligned tensors from chunks of huge pages. Nothing is freed before the tensors are."""

    CHUNK = 64 << 20  # the unused rest of a chunk is never touched, so it takes no memory

    def __init__(self) -> None:
        self._rest = np.zeros(0, dtype=np.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Like torch.empty."""
        count = math.prod(shape) * dtype.itemsize
        size = -(-count // ALIGNMENT) * ALIGNMENT
        if size > len(self._rest):
            self._rest = lazy_zeros(max(size, self.CHUNK))
        piece, self._rest = self._rest[:count], self._rest[size:]
        return torch.from_numpy(piece).view(dtype).view(*shape)
