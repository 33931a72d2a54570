"""The LoRA adapters of one rank: loaded and unloaded between steps, each in a slot that requests refer to."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from engine.errors import ModelError, cause_of
from engine.model.loading.meta_model import MetaModel
from engine.model.lora.lora_weights import Adapter, read_adapter, shard_adapter
from engine.model.runtime.vocab_shard import VocabShard
from engine.model.sharding.tp_plan import TPPlan
from engine.worker.model_copy import ModelCopy
from engine.worker.rank_causes import agreement
from engine.worker.rank_protocol import PeerLostError

LOAD_ADAPTER = "load_adapter"  # the call: key, path, copy

log = logging.getLogger("redline.worker")


class HoldsAdapters(Protocol):
    """The part of a model backend that holds adapters."""

    def add_adapter(self, slot: int, adapter: Adapter) -> None: ...

    def drop_adapter(self, slot: int) -> None: ...


class AdapterRanks(Protocol):
    """What a rank must know of the others that have the rest of the model. All ranks make the same calls."""

    def own_part(self, adapter: Adapter) -> Adapter:
        """Reduce an adapter to what this rank has of the model. Raises ModelError if it can't be divided."""
        ...

    def agree(self, cause: str) -> str:
        """The first cause that a rank passes; "": each has passed ""."""
        ...

    def wait(self) -> None:
        """Wait for all ranks."""
        ...


@dataclass(frozen=True, slots=True)
class AdapterSharding:
    """How adapters are sharded for this rank; implements `AdapterRanks` for the ranks that share its layers."""

    tp_plan: TPPlan
    part: VocabShard
    base: str  # prefix of the base model's parameter paths
    model: nn.Module  # with the shapes of this rank's shard

    def own_part(self, adapter: Adapter) -> Adapter:
        return shard_adapter(adapter, self.tp_plan, self.part.group.rank, self.base, self.model)

    def agree(self, cause: str) -> str:
        return agreement(self.part.group)([cause])[0]

    def wait(self) -> None:
        self.part.group.smallest(0)


def adapter_sharding(meta_model: MetaModel, tp_plan: TPPlan | None) -> AdapterSharding | None:
    """How adapters are sharded for this rank; None with one rank."""
    if tp_plan is None or meta_model.vocab_shard is None:
        return None
    base = f"{meta_model.path(meta_model.decoder.base_model)}."
    return AdapterSharding(tp_plan, meta_model.vocab_shard, base, meta_model.decoder)


class AdapterManager:
    """Loads and unloads adapters by the key that the core gives them. Each load has a new key.

    Args:
        slots: slot by adapter key; "" stands for no adapter. Shared with the batch state, which reads it.
        ranks: None with one rank.
    """

    def __init__(self, backend: HoldsAdapters, slots: dict[str, int], ranks: AdapterRanks | None):
        self._backend = backend
        self._slots = slots
        self._ranks = ranks
        self.calls: dict[str, Callable[..., Any]] = {LOAD_ADAPTER: self.load, "unload_adapter": self.unload}

    def load(self, key: str, path: str, copy: str = "") -> int:
        """Load an adapter and return its bytes on this rank.

        Raises ModelError, on all ranks if one fails: with the rank's own cause, or that of the first one that failed.

        Args:
            key: see above.
            path: of its folder.
            copy: the key of a copy, which is read if this machine has one, see model_copy.py; empty: there is none.
        """
        slot = next(i for i in range(len(self._slots)) if i not in self._slots.values())
        error: ModelError | None = None
        size = 0
        try:
            copied = ModelCopy(copy).folder if copy else None
            size = self._add(slot, copied or Path(path))
        except PeerLostError:
            raise
        except ModelError as problem:
            error = problem
        except Exception as problem:  # clients choose the files, so no error in them may end the rank
            log.exception("the adapter in %s could not be loaded", path)
            error = ModelError(f"{path}: the adapter could not be loaded: {cause_of(problem)}")
        if self._ranks is not None:
            cause = self._ranks.agree(str(error or ""))
            error = error or (ModelError(f"another rank could not load the adapter: {cause}") if cause else None)
        if error is not None:
            self._backend.drop_adapter(slot)
            raise error
        self._slots[key] = slot
        return size

    def _add(self, slot: int, path: Path) -> int:
        adapter = read_adapter(path)
        if self._ranks is not None:
            adapter = self._ranks.own_part(adapter)
        self._backend.add_adapter(slot, adapter)
        return adapter.nbytes

    def unload(self, key: str) -> None:
        """Unload an adapter that no request uses. Raises ModelError if no adapter has the key."""
        slot = self._slots.get(key)
        if not key or slot is None:
            raise ModelError(f"no adapter has the key {key!r}")
        del self._slots[key]
        self._backend.drop_adapter(slot)
