"""Collectives between ranks by torch's gloo: on the loopback interface, or on the addresses of their machines."""

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.worker.rank_protocol import PeerLostError
from engine.worker.rank_store import open_store

# Ranks do the same work at the same time, so a rank waits this long only for one that hangs.
TIMEOUT = datetime.timedelta(minutes=10)
NO_TIMEOUT = datetime.timedelta(days=3650)  # for messages that follow a request, which may never come


def lost(error: RuntimeError) -> PeerLostError:
    """The error of a collective, or of a message to or from another rank."""
    return PeerLostError("lost another rank: " + (str(error).splitlines() or ["no reason given"])[0])


class GlooGroup:
    """Implements `engine.model.runtime.rank_group.RankGroup`. The constructor returns once all ranks have joined.

    Args:
        store: where they find each other, see rank_store.py.

    Raises PeerLostError if they don't.
    """

    timeout = TIMEOUT

    def __init__(self, rank: int, size: int, store: str):
        self.rank, self.size = rank, size
        gloo: Any = dist.ProcessGroupGloo  # init_process_group has no option for the interface
        options = gloo._Options()
        options._timeout = self.timeout
        try:
            joined_at, address = open_store(store, size)
            options._devices = [gloo.create_device(hostname=address)]
            self._group = gloo(joined_at, rank, size, options)
        except RuntimeError as error:
            raise lost(error) from error

    def close(self) -> None:
        """End its threads. A thread that releases a tensor after the interpreter has ended would crash the process."""
        del self._group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place. One rank sums each part for all others, so all get the same bits."""
        tensor = tensor.contiguous()
        try:
            self._group.allreduce([tensor]).wait()
        except RuntimeError as error:
            raise lost(error) from error
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, concatenated along the last dimension."""
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            self._group.allgather([parts], [tensor]).wait()
        except RuntimeError as error:
            raise lost(error) from error
        return torch.cat(parts, -1)

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        found = torch.tensor([number], dtype=torch.int64)
        try:
            self._group.allreduce([found], options).wait()
        except RuntimeError as error:
            raise lost(error) from error
        return int(found)

    def broadcast(self, tensors: list[Tensor], timeout: datetime.timedelta = TIMEOUT) -> list[Tensor]:
        """Copy rank 0's tensors to all ranks, in place. The other ranks pass contiguous tensors of the same sizes."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timeout
        try:
            for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
                work.wait()
        except RuntimeError as error:
            raise lost(error) from error
        return tensors
