"""A rank of bench_ranks.py: the real one, which also notes when it has a step's inputs and what was broadcast for them.

Leaves rank-N.bin at its end, in the folder that FOLDER names: int64[steps, 3], the step, ns of the monotonic clock when
the rank begins to compute it, and the bytes of what was broadcast since the step before. In a folder called …joined
what V0 broadcasts tensor by tensor goes in one piece.
"""

import dataclasses
import os
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import torch

from engine.worker import gloo_group, rank, runner
from engine.worker.rank_links import RankEnd
from engine.worker.rank_protocol import RankOptions
from engine.worker.slots import StepBatch

FOLDER = "REDLINE_BENCH_RANKS"  # environment variable


class _Noted:
    """A model backend that notes when it is given a step; all else is the backend's."""

    def __init__(self, inner: Any, log: array):
        self._inner = inner
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, batch: StepBatch) -> None:
        self._log.extend((batch.step, time.monotonic_ns(), gloo_group.GlooGroup.sent))  # type: ignore[attr-defined]
        gloo_group.GlooGroup.sent = 0  # type: ignore[attr-defined]
        self._inner.forward(batch)


def note(log: array, joined: bool) -> None:
    """Have the rank's model backend and group write down what is asked for; `joined`: tensors go as one."""
    build_backend, broadcast = runner.build_backend, gloo_group.GlooGroup.broadcast

    def build(*given: Any) -> Any:
        built = build_backend(*given)
        return dataclasses.replace(built, backend=_Noted(built.backend, log))

    def counted(self: gloo_group.GlooGroup, tensors: Any, *given: Any) -> Any:
        gloo_group.GlooGroup.sent += sum(tensor.nbytes for tensor in tensors)  # type: ignore[attr-defined]
        if not joined or len(tensors) < 2:
            return broadcast(self, tensors, *given)
        [whole] = broadcast(self, [torch.cat(tensors)], *given)
        for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.copy_(part)
        return tensors

    gloo_group.GlooGroup.sent = 0  # type: ignore[attr-defined]
    runner.build_backend = build
    gloo_group.GlooGroup.broadcast = counted  # type: ignore[method-assign]


def run(end: RankEnd, options: RankOptions) -> None:
    log, folder = array("q"), Path(os.environ[FOLDER])
    note(log, folder.name.endswith("joined"))
    plain_run(end, options)
    (folder / f"rank-{options.rank}.bin").write_bytes(log.tobytes())


plain_run = rank.run

if __name__ == "__main__":
    rank.run = run
    sys.exit(rank.main())
