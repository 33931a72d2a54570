"""The ranks of one machine as a group, over torch's gloo on the loopback interface."""

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.worker.wire import PeerLostError

# Ranks run the same work at the same time, so that one waits this long for another only if that one hangs.
PATIENCE = datetime.timedelta(minutes=10)


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
