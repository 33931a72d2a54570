"""Where weights are loaded to: the host's memory or a device's, a band of a file at a time."""

from typing import Protocol

import torch
from torch import Tensor


class WeightMemory(Protocol):
    """Used by one thread, while a model is loaded."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor to load."""
        ...

    def band(self, nbytes: int) -> Tensor:
        """Host memory to read a file into: uint8[nbytes], valid until the next call."""
        ...

    def load(self, target: Tensor, values: Tensor) -> None:
        """Copy host values into a tensor of this memory, or a part of one, and convert them to its dtype.

        Values that are not in the band may be overwritten or freed afterwards.
        """
        ...


class TorchMemory:
    """Implements `WeightMemory` for the host and for any device of torch; `load` waits for the device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._band = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def band(self, nbytes: int) -> Tensor:
        if len(self._band) < nbytes:
            self._band = torch.empty(nbytes, dtype=torch.uint8)
        return self._band[:nbytes]

    def load(self, target: Tensor, values: Tensor) -> None:
        if self._device.type != "cpu":
            values = values.to(target.dtype)  # the device may lack the dtype of the values
        target.copy_(values)


def host_memory() -> TorchMemory:
    return TorchMemory(torch.device("cpu"))
