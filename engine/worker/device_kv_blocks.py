"""Copies KV blocks between the cache on an asynchronous device and host blocks, in the order of the device's work.

The parts of some blocks are gathered in a buffer on the device, from which each block is one copy; and the other way
around. Nothing waits: a host block may be read, or written by others, once a result of the step or of a later one has
arrived.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Int32s
from engine.worker.device import Device
from engine.worker.kv_blocks import Bytes, MappedBlocks, runs

STAGED_BYTES = 64 << 20  # of the buffer on the device


class DeviceBlocks(MappedBlocks):
    """Implements `engine.worker.kv_blocks.KVBlocks`.

    Args:
        parts: of the KV cache on the device, each uint8[blocks, bytes].
        rank: among the ranks of the replica.
    """

    def __init__(self, device: Device, parts: Sequence[Tensor], rank: int = 0):
        super().__init__([part.shape[1] for part in parts], rank)
        self._device = device
        self._parts = parts
        self._host: Tensor | None = None
        self._staged: Tensor | None = None

    def use(self, host: Bytes) -> None:
        num_blocks, own = host.shape
        self._host = torch.from_numpy(host)
        self._device.register_host(self._host)
        staged = max(1, min(STAGED_BYTES // own, num_blocks))
        self._staged = self._device.zeros((staged, own), torch.uint8)

    def copy(self, copies: Int32s) -> None:
        assert self._staged is not None, "no host blocks are attached"
        most = len(self._staged)
        for out, blocks, host_blocks in runs(copies):
            move = self._copy_out if out else self._copy_in
            for begin in range(0, len(blocks), most):
                index = self._device.put({"blocks": blocks[begin : begin + most].astype(np.int64)})
                move(index["blocks"], host_blocks[begin : begin + most].tolist())

    def _copy_out(self, blocks: Tensor, host_blocks: list[int]) -> None:
        assert self._staged is not None
        assert self._host is not None
        begin = 0
        for part in self._parts:
            end = begin + part.shape[1]
            self._staged[: len(host_blocks), begin:end] = part.index_select(0, blocks)
            begin = end
        for number, host_block in enumerate(host_blocks):
            self._device.copy(self._host[host_block], self._staged[number])

    def _copy_in(self, blocks: Tensor, host_blocks: list[int]) -> None:
        assert self._staged is not None
        assert self._host is not None
        for number, host_block in enumerate(host_blocks):
            self._device.copy(self._staged[number], self._host[host_block])
        begin = 0
        for part in self._parts:
            end = begin + part.shape[1]
            part.index_copy_(0, blocks, self._staged[: len(host_blocks), begin:end])
            begin = end
