"""Rank groups whose ranks are threads of one process."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class ThreadGroup:
    """A RankGroup of threads, which exchange tensors through a shared list."""

    def __init__(self, rank: int, size: int, slots: list[Tensor], barrier: threading.Barrier):
        self.rank, self.size = rank, size
        self._slots, self._barrier = slots, barrier

    def _exchange(self, tensor: Tensor, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self._slots[self.rank] = tensor.clone()
        self._barrier.wait()
        joined = join(list(self._slots))
        self._barrier.wait()
        return joined

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor, lambda parts: torch.stack(parts).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor, lambda parts: torch.cat(parts, -1))

    def smallest(self, number: int) -> int:
        return int(self._exchange(torch.tensor(number), lambda parts: torch.stack(parts).amin(0)))


def make_groups(size: int) -> list[ThreadGroup]:
    slots, barrier = [torch.empty(0)] * size, threading.Barrier(size, timeout=30)
    return [ThreadGroup(rank, size, slots, barrier) for rank in range(size)]
