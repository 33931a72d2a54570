"""Adapters of one rank while it serves: loaded and dropped between steps, each in a slot that rows name."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import ModelError, cause_of
from engine.model.lora import Adapter, cut_adapter, read_adapter
from engine.model.split import Split
from engine.model.vocabulary import Slice
from engine.worker.network import Network
from engine.worker.wire import PeerLostError

log = logging.getLogger("redline.worker")


@dataclass(frozen=True, slots=True)
class Share:
    """What of an adapter is this rank's: `base` is what the base model's paths begin with."""

    split: Split
    part: Slice
    base: str
    model: nn.Module  # with the shapes of this rank's share

    def cut(self, adapter: Adapter) -> Adapter:
        return cut_adapter(adapter, self.split, self.part.group.rank, self.base, self.model)

    def agreed(self, failed: bool) -> bool:
        """Whether no rank failed."""
        return int(self.part.group.all_reduce(torch.tensor([int(failed)], dtype=torch.int64))) == 0


class Adapters:
    """By key, which the core chooses anew for each that is loaded."""

    def __init__(self, network: Network, slots: dict[str, int], share: Share | None):
        self._network = network
        self._slots = slots  # the rows', which has "" for no adapter
        self._share = share
        self.calls: dict[str, Callable[..., Any]] = {"load_adapter": self.load, "unload_adapter": self.unload}

    def load(self, key: str, path: str) -> int:
        """Read an adapter and make it ready; returns its bytes, of this rank. Raises ModelError, on all ranks alike."""
        slot = next(i for i in range(len(self._slots)) if i not in self._slots.values())
        error: ModelError | None = None
        size = 0
        try:
            size = self._add(slot, path)
        except PeerLostError:
            raise
        except ModelError as problem:
            error = problem
        except Exception as problem:  # an adapter is a client's: whatever is wrong with it must not end the rank
            log.exception("the adapter in %s could not be loaded", path)
            error = ModelError(f"{path}: the adapter could not be loaded: {cause_of(problem)}")
        if self._share is not None and not self._share.agreed(error is not None) and error is None:
            error = ModelError("another rank could not load the adapter")
        if error is not None:
            self._network.drop_adapter(slot)  # whatever of it is there
            raise error
        self._slots[key] = slot
        return size

    def _add(self, slot: int, path: str) -> int:
        adapter = read_adapter(Path(path))
        if self._share is not None:
            adapter = self._share.cut(adapter)
        self._network.add_adapter(slot, adapter)
        return adapter.bytes

    def unload(self, key: str) -> None:
        """Forget an adapter that no row has; ModelError if it isn't here."""
        slot = self._slots.get(key)
        if not key or slot is None:
            raise ModelError(f"no adapter has the key {key!r}")
        del self._slots[key]
        self._network.drop_adapter(slot)
