"""The ranks of one machine as a group, over torch's gloo on the loopback interface."""

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.worker.wire import PeerLostError

# Ranks run the same work at the same time, so that one waits this long for another only if that one hangs.
PATIENCE = datetime.timedelta(minutes=10)
FOREVER = datetime.timedelta(days=3650)  # for what comes when somebody asks for something


def _lost(error: RuntimeError) -> PeerLostError:
    return PeerLostError((str(error).splitlines() or ["no reason given"])[0])


class GlooGroup:
    """Implements `engine.model.group.Group`; waits until all ranks are there."""

    def __init__(self, rank: int, size: int, store: str):
        self.rank, self.size = rank, size
        gloo: Any = dist.ProcessGroupGloo  # not by init_process_group, which can't be told the interface
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = PATIENCE
        try:
            self._group = gloo(dist.FileStore(store, size), rank, size, options)
        except RuntimeError as error:
            raise _lost(error) from error

    def close(self) -> None:
        """End its threads: one that lets go of a tensor after Python's end would end the process by a signal."""
        del self._group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place; each part is summed by one rank and copied to the others, bit for bit."""
        tensor = tensor.contiguous()
        try:
            self._group.allreduce([tensor]).wait()
        except RuntimeError as error:
            raise _lost(error) from error
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors laid end to end along the last dimension."""
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            self._group.allgather([parts], [tensor]).wait()
        except RuntimeError as error:
            raise _lost(error) from error
        return torch.cat(parts, -1)

    def broadcast(self, tensors: list[Tensor], patience: datetime.timedelta = PATIENCE) -> list[Tensor]:
        """Rank 0's tensors on all ranks, in place: the others give contiguous ones of their sizes, and wait so long."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = patience
        try:
            for work in [self._group.broadcast([tensor], options) for tensor in tensors]:
                work.wait()
        except RuntimeError as error:
            raise _lost(error) from error
        return tensors
