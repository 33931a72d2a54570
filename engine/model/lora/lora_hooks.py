"""Applies LoRA adapters in transformers' classes: hooks add to the outputs of linears, for tokens with an adapter."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.model.lora.lora_weights import Adapter, LowRank, check_adapter


def tokens_by_adapter(
    slots: NDArray[np.int64] | None, row_of: NDArray[np.int64]
) -> list[tuple[int, NDArray[np.int64]]]:
    """The adapter slots of a step, each with the indices of its tokens.

    Args:
        slots: the adapter slot of each row of the batch, -1 for none; None if no row has an adapter.
        row_of: [tokens], the row of each token.
    """
    if slots is None:
        return []
    of_token = slots[row_of]
    used = np.unique(of_token)
    return [(slot, np.flatnonzero(of_token == slot)) for slot in used[used >= 0].tolist()]


class LoraHooks:
    """The adapters of a model, by slot. Only linears that an adapter changes have a hook.

    `place` moves a tensor of an adapter to the model's device.
    """

    def __init__(self, model: Any, place: Callable[[Tensor], Tensor] = lambda tensor: tensor):
        self._model = model
        self._place = place
        self._parts: dict[str, dict[int, LowRank]] = {}  # by path and slot
        self._hooks: dict[str, RemovableHandle] = {}
        self._tokens: list[tuple[int, Tensor]] = []  # of the step: slots, and indices of their tokens

    def add(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a free slot. Raises ModelError if it does not fit the model."""
        check_adapter(adapter, self._model)
        for path, part in adapter.linears.items():
            linear = self._model.get_submodule(path)
            dtype = linear.weight.dtype
            self._parts.setdefault(path, {})[slot] = LowRank(
                self._place(part.down.to(dtype)), self._place(part.up.to(dtype))
            )
            if path not in self._hooks:  # prepended: it must run before the reductions over ranks
                self._hooks[path] = linear.register_forward_hook(_Hook(self, path), prepend=True)

    def drop(self, slot: int) -> None:
        for path in list(self._parts):
            self._parts[path].pop(slot, None)
            if not self._parts[path]:
                del self._parts[path]
                self._hooks.pop(path).remove()

    def begin(self, slots: NDArray[np.int64] | None, row_of: NDArray[np.int64]) -> None:
        """Begin a step; arguments as of `tokens_by_adapter`."""
        self._tokens = [(slot, torch.from_numpy(tokens)) for slot, tokens in tokens_by_adapter(slots, row_of)]

    def begin_with(self, tokens: Sequence[tuple[int, Tensor]]) -> None:
        """Begin a step; `tokens` as of `tokens_by_adapter`, on the model's device."""
        self._tokens = list(tokens)

    def apply(self, path: str, x: Tensor, output: Tensor) -> None:
        """Add to a linear's output, in place, for the tokens whose adapter changes the linear."""
        parts = self._parts[path]
        x, output = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        for slot, tokens in self._tokens:
            part = parts.get(slot)
            if part is not None:
                # Not index_add_, which uses all threads even for one token. No token occurs twice.
                output[tokens] += x[tokens] @ part.down.T @ part.up.T


class _Hook:
    def __init__(self, hooks: LoraHooks, path: str):
        self._hooks = hooks
        self._path = path

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._hooks.apply(self._path, inputs[0], output)
