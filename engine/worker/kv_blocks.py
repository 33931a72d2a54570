"""Copies whole KV blocks of a rank between its KV cache and host blocks (see `engine.host_blocks`).

A rank's KV cache consists of parts, such as the keys of a layer slot, in each of which a block is contiguous. In a host
block the parts of a block lie end to end. The copies of a step are done before its forward pass, in the order of the
message: a block is copied out before something else is written to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.arrays import Int32s
from engine.host_blocks import ATTACH, map_rank
from engine.messages import COPY_OUT
from engine.model.runtime.attention_interface import KVCache

Bytes = NDArray[np.uint8]


class KVBlocks(Protocol):
    """The KV blocks of a rank."""

    @property
    def calls(self) -> dict[str, Callable[..., Any]]:
        """By method, for the runner."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of a block on this rank."""
        ...

    def use(self, host: Bytes) -> None:
        """Copy to and from these host blocks, uint8[blocks, block_bytes]."""
        ...

    def copy(self, copies: Int32s) -> None:
        """Execute copies in order: [n, 3], see `CopyingStep`."""
        ...


class MappedBlocks(ABC):
    """KV blocks that are copied to and from the host blocks of the core's machine, as far as they have these.

    Args:
        part_bytes: of a block, in each part of the KV cache.
        rank: among the ranks of the replica.
    """

    def __init__(self, part_bytes: Sequence[int], rank: int):
        self.block_bytes = sum(part_bytes)
        self._rank = rank

    @property
    def calls(self) -> dict[str, Callable[..., Any]]:
        return {ATTACH: self.attach}

    def attach(self, path: str, num_blocks: int, part_bytes: Sequence[int]) -> None:
        """Map the host blocks; the arguments are those of `HostBlocks.attachment`."""
        if (planned := part_bytes[self._rank]) != self.block_bytes:
            raise RuntimeError(f"a KV block has {self.block_bytes} bytes on this rank, {planned} were planned")
        self.use(map_rank(path, self._rank, num_blocks, part_bytes))

    @abstractmethod
    def use(self, host: Bytes) -> None: ...


class CPUBlocks(MappedBlocks):
    """The KV blocks of a rank on the CPU; implements KVBlocks.

    Args:
        parts: of the KV cache, each [blocks, bytes].
        rank: among the ranks of the replica.
    """

    def __init__(self, parts: Iterable[Bytes], rank: int = 0):
        self._parts = list(parts)
        super().__init__([part.shape[1] for part in self._parts], rank)
        self._host: Bytes | None = None

    def use(self, host: Bytes) -> None:
        self._host = host

    def copy(self, copies: Int32s) -> None:
        assert self._host is not None, "no host blocks are attached"
        for out, blocks, host_blocks in runs(copies):
            begin = 0
            for part in self._parts:
                end = begin + part.shape[1]
                host = self._host[:, begin:end]
                if out:
                    host[host_blocks] = part[blocks]
                else:
                    part[blocks] = host[host_blocks]
                begin = end


def runs(copies: Int32s) -> Iterator[tuple[bool, Int32s, Int32s]]:
    """Copies that follow each other in one direction: whether out of the KV cache, its blocks, the host blocks."""
    ends = np.flatnonzero(np.diff(copies[:, 0])) + 1
    for some in np.split(copies, ends):
        yield some[0, 0] == COPY_OUT, some[:, 1], some[:, 2]


def cache_parts(cache: KVCache) -> list[Tensor]:
    """The parts of a cache in torch: uint8[blocks, bytes], views on the cache's device."""
    found = []
    for slot in zip(cache.keys, cache.values, cache.key_scales, cache.value_scales, strict=True):
        found += [one.view(len(one), -1).view(torch.uint8) for one in slot if one is not None]
    return found
