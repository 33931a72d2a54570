"""Any device type that torch knows (xpu, mps, hpu, cpu, …), used without assumptions about its streams.

Copies to the host wait for the device, so the next step is laid out after this one. Each step's copy to the device has
memory of its own, so nothing captured can read it, and `capture` records nothing.
"""

import atexit
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.checkpoints.weight_memory import TorchMemory
from engine.model.runtime.rank_group import RankGroup
from engine.worker.device import Columns
from engine.worker.gloo_group import GlooGroup

ALIGNMENT = 16  # bytes; kernels load vectors of this size


class StagedColumns:
    """The arrays of a step end to end in a buffer, each at a multiple of ALIGNMENT."""

    def __init__(self, columns: Columns):
        self._columns = columns
        self._offsets: dict[str, int] = {}
        at = 0
        for name, column in columns.items():
            self._offsets[name] = at
            at += math.ceil(column.nbytes / ALIGNMENT) * ALIGNMENT
        self.nbytes = at

    def write(self, buffer: Tensor) -> None:
        """Write all arrays into a host buffer uint8[nbytes]."""
        host = buffer.numpy()
        for name, at in self._offsets.items():
            column = np.ascontiguousarray(self._columns[name])
            host[at : at + column.nbytes] = column.reshape(-1).view(np.uint8)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The arrays in a buffer that `write` filled, or in a copy of it."""
        return {
            name: buffer[at : at + self._columns[name].nbytes]
            .view(getattr(torch, self._columns[name].dtype.name))
            .view(self._columns[name].shape)
            for name, at in self._offsets.items()
        }


class HostCopy:
    """Implements `engine.worker.device.Fetched` for a copy that is complete."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def ready(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._tensor


class TorchDevice:
    """Implements `engine.worker.device.Device`; `name` as torch writes it, e.g. xpu:0."""

    converts_fp8 = False
    captures = False

    def __init__(self, name: str):
        self.device = torch.device(name)
        self._staging = torch.empty(0, dtype=torch.uint8)

    def bind_thread(self) -> None:
        """Threads need nothing."""

    def place(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self.device).copy_(tensor)

    def weight_memory(self) -> TorchMemory:
        return TorchMemory(self.device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def put(self, columns: Columns) -> dict[str, Tensor]:
        staged = StagedColumns(columns)
        if len(self._staging) < staged.nbytes:
            self._staging = torch.empty(2 * staged.nbytes, dtype=torch.uint8)
        host = self._staging[: staged.nbytes]
        staged.write(host)
        return staged.views(self.place(host))

    def put_masks(self, columns: Columns) -> dict[str, Tensor]:
        return self.put(columns)

    def fetch(self, tensor: Tensor) -> HostCopy:
        return HostCopy(tensor.to("cpu", copy=True))

    def register_host(self, memory: Tensor) -> None:
        """Nothing: its copies wait."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def memory(self) -> None:
        return None

    def release_memory(self) -> None:
        """Nothing is known of the device's allocator."""

    def clock(self) -> float:
        return time.perf_counter()

    def elapsed(self, began: float, ended: float) -> float:
        return ended - began

    def join(self, rank: int, size: int, store: str) -> RankGroup:
        if self.device.type != "cpu":
            raise ConfigError(f"--tp {size} does not work on {self.device.type}")
        group = GlooGroup(rank, size, store)
        atexit.register(group.close)
        return group
