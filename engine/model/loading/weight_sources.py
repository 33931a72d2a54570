"""Where parameters get their values: from a checkpoint, or from a random generator (`--load-format dummy`)."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.checkpoints.mistral_tensors import CheckpointTensor
from engine.model.checkpoints.reader import Reader
from engine.model.checkpoints.weight_mapping import Placement, WeightMapping
from engine.model.checkpoints.weight_memory import WeightMemory
from engine.model.loading.meta_model import ShardSlice, TargetParameter, first_paths

PROGRESS_INTERVAL = 0.1  # seconds between two reports of progress, at least


class CheckpointSource:
    """Reads the files of a checkpoint; `progress` is called with the bytes of each stored tensor that was read."""

    def __init__(
        self, stored: dict[str, CheckpointTensor], mapping: WeightMapping, progress: Callable[[int], None] | None = None
    ):
        self._stored = stored
        self._mapping = mapping
        self._reader = Reader()
        self._progress = progress or (lambda _: None)

    def use(self, memory: WeightMemory) -> None:
        self._reader.memory = memory

    def fill(self, module: nn.Module, targets: dict[str, TargetParameter]) -> None:
        del module
        for target in targets.values():
            if target.shard is not None and not target.shard.ranges:
                target.out.zero_()
                continue
            for placement in self._mapping.placements[target.path]:
                self._copy(placement, target.shard, target.out)

    def fill_buffer(self, path: str, out: Tensor) -> None:
        for placement in self._mapping.placements.get(path, ()):
            self._copy(placement, None, out)

    def close(self) -> None:
        self._reader.close()

    def _copy(self, placement: Placement, shard: ShardSlice | None, out: Tensor) -> None:
        stored = self._stored[placement.stored]
        leading = len(placement.shape) - len(stored.shape)
        for begin, source, length, dim in _overlaps(placement, shard):
            at, shape = list(placement.begin), list(placement.shape)
            first = list(placement.source or (0,) * len(shape))
            if shard is not None:
                at[dim], first[dim], shape[dim] = begin, first[dim] + source, length
            box = out
            for i in at[:leading]:
                box = box[i]
            inner = tuple(slice(a, a + n) for a, n in zip(at[leading:], shape[leading:], strict=True))
            self._reader.copy(stored, tuple(first[leading:]), box[inner])
        self._progress(stored.nbytes * math.prod(placement.shape) // max(stored.numel, 1))


def _overlaps(placement: Placement, shard: ShardSlice | None) -> Iterator[tuple[int, int, int, int]]:
    """What a shard has of a placement: (begin in the shard, begin in the placement, length, dimension).

    Example: a placement of rows 4-7 and a shard of rows 0-1 and 6-9 give (2, 2, 2, 0): rows 6 and 7 of the parameter.
    """
    if shard is None:
        yield 0, 0, 0, 0
        return
    dim = shard.dim % len(placement.shape)
    first, end = placement.begin[dim], placement.begin[dim] + placement.shape[dim]
    before = 0
    for begin, length in shard.ranges:
        low, high = max(begin, first), min(begin + length, end)
        if low < high:
            yield before + low - begin, low - first, high - low, dim
        before += length


def checkpoint_source(
    stored: dict[str, CheckpointTensor], mapping: WeightMapping, progress: Callable[[int, int], None] | None
) -> CheckpointSource:
    """The source of a checkpoint; `progress` is called with the bytes read and the total."""
    if progress is None:
        return CheckpointSource(stored, mapping)
    used = {placement.stored for placements in mapping.placements.values() for placement in placements}
    return CheckpointSource(stored, mapping, _ProgressMeter(sum(stored[name].nbytes for name in used), progress).add)


def share_tied(mapping: WeightMapping, model: nn.Module) -> list[str]:
    """Give the first of tied parameters the placements of whichever the checkpoint names.

    Returns the parameters that have no placements under any of their names.
    """
    first = first_paths(model.state_dict(keep_vars=True))
    for name, placements in list(mapping.placements.items()):
        mapping.placements.setdefault(first[name], placements)
    return sorted(name for name in first if first[name] not in mapping.placements)


class _ProgressMeter:
    """Adds up bytes and reports them at intervals."""

    def __init__(self, total: int, progress: Callable[[int, int], None]):
        self._total = total
        self._progress = progress
        self._done = 0
        self._reported_at = 0.0

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._reported_at >= PROGRESS_INTERVAL or self._done == self._total:
            self._reported_at = now
            self._progress(self._done, self._total)


class RandomSource:
    """Initial values as the class has them before training. A parameter's depend only on the seed and its path.

    They are made where the parameter is: each type of device has random numbers of its own.
    """

    def __init__(self, model: Any, seed: int):
        self._seed = seed
        self._owners = {path: module for path, module in model.named_modules() if hasattr(module, "_init_weights")}

    def use(self, memory: WeightMemory) -> None:
        """The memory of each parameter is where its values are made."""

    def fill(self, module: nn.Module, targets: dict[str, TargetParameter]) -> None:
        held = dict(module._parameters)
        path = next(iter(targets.values())).path
        digest = hashlib.sha256(f"{self._seed} {path}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:8], "little"))
            for name, target in targets.items():
                whole = torch.ones(target.shape, dtype=target.out.dtype, device=target.out.device)
                if whole.ndim > 1:  # in case the class does not initialize such a parameter
                    whole.normal_(std=0.02)
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
            self._owner(path)._init_weights(module)
        for name, target in targets.items():
            whole = module.get_parameter(name)
            shard = target.shard
            if shard is None:
                target.out.copy_(whole)
            elif not shard.ranges:
                target.out.zero_()
            else:
                target.out.copy_(torch.cat([whole.narrow(shard.dim, *part) for part in shard.ranges], shard.dim))
        module._parameters.update(held)

    def _owner(self, path: str) -> Any:
        """The class of transformers that a parameter belongs to: towers initialize their own."""
        parts = path.split(".")
        prefixes = (".".join(parts[:count]) for count in range(len(parts) - 1, -1, -1))
        return next(self._owners[prefix] for prefix in prefixes if prefix in self._owners)

    def fill_buffer(self, path: str, out: Tensor) -> None:
        """Buffers keep the values that the class gave them."""

    def close(self) -> None:
        """Nothing was opened."""
