"""An asynchronous device, as a rank uses it: the host enqueues work and doesn't wait for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.model.checkpoints.weight_memory import WeightMemory
from engine.model.runtime.rank_group import RankGroup

Columns = Mapping[str, NDArray[Any]]  # arrays of a step, by name
Mark = Any  # a point in the device's queue; its type belongs to the device


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a device, of which other processes may use a part.

    used_bytes, peak_bytes: what the tensors of this process take now, and took at most.
    """

    total_bytes: int
    free_bytes: int
    used_bytes: int
    peak_bytes: int


class Fetched(Protocol):
    """A tensor on its way to the host. Both methods may be called from any thread, and repeatedly."""

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> Tensor:
        """The copy on the host, once the device has made it. Raises the error of a failed device."""
        ...


class Device(Protocol):
    """Memory and queue of one device. All methods but those of marks and `Fetched` belong to one thread."""

    @property
    def converts_fp8(self) -> bool:
        """Whether it has instructions that convert float8_e4m3fn."""
        ...

    @property
    def captures(self) -> bool:
        """Whether `capture` records."""
        ...

    def bind_thread(self) -> None:
        """Called once by the thread that enqueues work, before all other methods."""
        ...

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of a host tensor on the device; waits. For what is not part of each step, such as adapters."""
        ...

    def weight_memory(self) -> WeightMemory:
        """Where weights are loaded to, a band of a file at a time. It has buffers on the host until it is dropped."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor of zeros on the device."""
        ...

    def put(self, columns: Columns) -> dict[str, Tensor]:
        """Enqueue one copy of a step's arrays to the device.

        Returns the arrays as tensors, which are overwritten by the next call. With the same names, shapes and dtypes
        they have the same addresses again, so that a captured step can read them.
        """
        ...

    def put_masks(self, columns: Columns) -> dict[str, Tensor]:
        """Enqueue a copy of arrays that a step gets after its own, which stay. The next call overwrites them."""
        ...

    def fetch(self, tensor: Tensor) -> Fetched:
        """Enqueue a copy of a tensor to the host; the tensor may be overwritten by work that is enqueued later."""
        ...

    def register_host(self, memory: Tensor) -> None:
        """Prepare memory of the host, which stays, for `copy`."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy between the device and memory that is registered; both are contiguous."""
        ...

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record the work that `run` enqueues, and return a function that enqueues it again.

        `run` may be called several times before it is recorded. What it allocates belongs to the recording.
        """
        ...

    def memory(self) -> DeviceMemory | None:
        """What is in use once all enqueued work is done, for which it waits; None: the device does not tell."""
        ...

    def release_memory(self) -> None:
        """Return memory that no tensor uses to the device, and forget the peak."""
        ...

    def clock(self) -> Mark:
        """Mark the present end of the queue."""
        ...

    def elapsed(self, began: Mark, ended: Mark) -> float:
        """Seconds that the device took from one mark to the other; waits for the second one. From any thread."""
        ...

    def join(self, rank: int, size: int, store: str) -> RankGroup:
        """Join the other ranks of a model, which find each other at `store` (see rank_store.py)."""
        ...
