"""Ranks that are threads of one process."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class ThreadGroup:
    """Ranks that are threads: what each puts on the table, all take in the order of ranks."""

    def __init__(self, rank: int, size: int, table: list[Tensor], barrier: threading.Barrier):
        self.rank, self.size = rank, size
        self._table, self._barrier = table, barrier

    def _exchange(self, tensor: Tensor, join: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self._table[self.rank] = tensor.clone()
        self._barrier.wait()
        joined = join(list(self._table))
        self._barrier.wait()
        return joined

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor, lambda parts: torch.stack(parts).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._exchange(tensor, lambda parts: torch.cat(parts, -1))


def make_groups(size: int) -> list[ThreadGroup]:
    table, barrier = [torch.empty(0)] * size, threading.Barrier(size, timeout=30)
    return [ThreadGroup(rank, size, table, barrier) for rank in range(size)]
