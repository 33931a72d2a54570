"""Collectives between GPUs, by NCCL, or RCCL on GPUs by AMD.

They are enqueued on the current stream of the calling thread, as kernels are, and can be captured with these. Tensors
of the host, which few calls have, go over gloo. A rank that is lost is found by its socket (see
`engine.worker.multiprocess`), not here: the host does not wait for collectives of the device.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import EngineDeadError
from engine.text import first_line
from engine.worker.gloo_group import TIMEOUT, GlooGroup
from engine.worker.rank_store import open_store

# Threads of torch that watch the group through its store, whose file is deleted once the ranks have joined.
SETTINGS = {"TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}


class NcclGroup:
    """Implements `engine.model.runtime.rank_group.RankGroup`. The constructor returns once all ranks have joined.

    It may exist once in a process. Raises EngineDeadError if the ranks can't reach each other.

    Args:
        store: where the ranks find each other, see rank_store.py; a file must not exist yet.
        device: the rank's device, which is the calling thread's current one.
        backend: of torch.distributed for the device.
    """

    def __init__(self, rank: int, size: int, store: str, device: torch.device, backend: str = "nccl"):
        self.rank, self.size = rank, size
        self._host = GlooGroup(rank, size, f"{store}-host")
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            dist.init_process_group(
                backend,
                store=open_store(f"{store}-{backend}", size)[0],
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
                device_id=device if device.type != "cpu" else None,
            )
            joined = torch.ones(1, device=device)
            dist.all_reduce(joined)
            found = int(joined)
        except RuntimeError as error:
            raise EngineDeadError(f"the ranks could not join by {backend}: {first_line(error)}") from error
        if found != size:
            raise EngineDeadError(f"{backend} summed up {found} of {size} ranks")

    def close(self) -> None:
        """End its threads; collectives that are under way are given up."""
        self._host.close()
        if dist.group.WORLD is not None:
            dist.group.WORLD.abort()  # to destroy it would wait for captured steps that have collectives

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if tensor.device.type == "cpu":
            return self._host.all_reduce(tensor)
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, concatenated along the last dimension."""
        if tensor.device.type == "cpu":
            return self._host.all_gather(tensor)
        tensor = tensor.contiguous()
        parts = tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(parts, tensor)
        return torch.cat(parts.chunk(self.size), -1)

    def smallest(self, number: int) -> int:
        return self._host.smallest(number)
