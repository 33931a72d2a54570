"""KV blocks in main memory, which the EngineCore and all ranks of a replica share if they are on one machine.

    rank 0: block 0, block 1, … │ rank 1: block 0, block 1, … │ …

The parts of a block differ in size where pipeline stages have different layers. Ranks copy blocks between it and their
KV cache, in the order of steps. The core's process reads and writes its files from here, so no bytes of blocks travel
in messages. The memory has no name in any file system, and ends with the last process that maps it.
"""

import mmap
import os
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError

ATTACH = "attach_host_blocks"  # the call by which a rank maps the blocks: `HostBlocks.attachment`


class HostBlocks:
    """The core's side. Pages are allocated when used.

    Args:
        num_blocks: how many.
        part_bytes: of a block, on each rank.

    Raises ConfigError where the system has no memory of this kind.
    """

    def __init__(self, num_blocks: int, part_bytes: Sequence[int]):
        if not hasattr(os, "memfd_create"):
            raise ConfigError("--kv-spill needs Linux: leave the flag out")
        self.num_blocks, self.part_bytes = num_blocks, tuple(part_bytes)
        self._descriptor = os.memfd_create("redline-kv-blocks")
        os.ftruncate(self._descriptor, num_blocks * sum(part_bytes))
        self._memory = memoryview(mmap.mmap(self._descriptor, 0))
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def path(self) -> str:
        """Where processes of this machine and user can map it while this one runs; see `map_rank`."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def attachment(self) -> dict[str, Any]:
        """The arguments of ATTACH."""
        return {"path": self.path, "num_blocks": self.num_blocks, "part_bytes": self.part_bytes}

    def parts(self, block: int) -> list[memoryview]:
        """The bytes of a block on each rank; writable."""
        found = []
        for size, end in zip(self.part_bytes, accumulate(self.part_bytes), strict=True):
            begin = (end - size) * self.num_blocks + block * size
            found.append(self._memory[begin : begin + size])
        return found


def map_rank(path: str, rank: int, num_blocks: int, part_bytes: Sequence[int]) -> NDArray[np.uint8]:
    """A rank's side: its part of all blocks, uint8[num_blocks, part_bytes[rank]]."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    own, before = part_bytes[rank], sum(part_bytes[:rank])
    return np.frombuffer(memory, np.uint8, num_blocks * own, num_blocks * before).reshape(num_blocks, own)


class OwnHostBlocks:
    """The part of a rank on another machine than its core, which shares it with nobody. Pages are allocated when used.

    Attributes:
        array: uint8[num_blocks, block_bytes]; block_bytes: of a block on this rank.
    """

    def __init__(self, num_blocks: int, block_bytes: int):
        memory = mmap.mmap(-1, num_blocks * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array: NDArray[np.uint8] = np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)

    def parts(self, block: int) -> list[memoryview]:
        """The bytes of a block; writable."""
        return [memoryview(self.array[block])]
