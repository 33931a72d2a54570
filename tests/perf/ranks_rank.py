"""A rank of bench_ranks.py: the real one, which also notes when it has a step's inputs and what was broadcast for them.

Leaves rank-N.bin at its end, in the folder that the executor was given: int64[steps, 3], the step, ns of the monotonic
clock when the rank begins to compute it, and the bytes of what was broadcast since the step before.
"""

import dataclasses
import socket
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from engine.worker import group, rank, runner
from engine.worker.rows import StepBatch
from engine.worker.wire import Failed, Orders


class _Noted:
    """A network that notes when it is given a step; all else is the network's."""

    def __init__(self, inner: Any, log: array):
        self._inner = inner
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, batch: StepBatch) -> None:
        self._log.extend((batch.step, time.monotonic_ns(), group.GlooGroup.told))  # type: ignore[attr-defined]
        group.GlooGroup.told = 0  # type: ignore[attr-defined]
        self._inner.forward(batch)


def note(log: array) -> None:
    """Have the rank's network and group write down what is asked for."""
    build_network, broadcast = runner.build_network, group.GlooGroup.broadcast

    def build(*given: Any) -> Any:
        built = build_network(*given)
        return dataclasses.replace(built, network=_Noted(built.network, log))

    def counted(self: group.GlooGroup, tensors: Any, *given: Any) -> Any:
        group.GlooGroup.told += sum(tensor.nbytes for tensor in tensors)  # type: ignore[attr-defined]
        return broadcast(self, tensors, *given)

    group.GlooGroup.told = 0  # type: ignore[attr-defined]
    runner.build_network = build
    group.GlooGroup.broadcast = counted  # type: ignore[method-assign]


def run(parent: socket.socket, orders: Orders) -> Failed | None:
    log = array("q")
    note(log)
    failed = plain_run(parent, orders)
    (Path(orders.store).parent.parent / f"rank-{orders.rank}.bin").write_bytes(log.tobytes())
    return failed


plain_run = rank.run

if __name__ == "__main__":
    rank.run = run
    sys.exit(rank.main())
