"""Adapters of one rank while it serves: loaded and dropped between steps, each in a slot that rows name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelError
from engine.model.lora import Adapter, cut_adapter, read_adapter
from engine.model.split import Split
from engine.model.vocabulary import Slice
from engine.worker.network import Network


@dataclass(frozen=True, slots=True)
class Share:
    """What of an adapter is this rank's: `base` is what the base model's paths begin with."""

    split: Split
    part: Slice
    base: str

    def cut(self, adapter: Adapter) -> Adapter:
        return cut_adapter(adapter, self.split, self.part.group.rank, self.base)

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
        error: Exception | None = None
        adapter: Adapter | None = None
        try:
            adapter = read_adapter(Path(path))
            if self._share is not None:
                adapter = self._share.cut(adapter)
            self._network.add_adapter(slot, adapter)
        except ModelError as problem:
            error = problem
        if self._share is not None and not self._share.agreed(error is not None) and error is None:
            self._network.drop_adapter(slot)
            error = ModelError("another rank could not load the adapter")
        if error is not None or adapter is None:
            raise error or ModelError(f"{path} isn't an adapter")
        self._slots[key] = slot
        return adapter.bytes

    def unload(self, key: str) -> None:
        """Forget an adapter that no row has."""
        self._network.drop_adapter(self._slots.pop(key))
