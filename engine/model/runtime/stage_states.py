"""Puts the hidden states of a pipeline stage into transformers' class, and takes them out."""

from typing import Any

from torch import Tensor, nn


class StageStates:
    """The hidden states before the first layer of a stage and after its last one, [1, tokens, hidden].

    The class computes everything else as it does with all layers, such as rotary positions; what it makes of its
    embeddings is replaced by `entering`, unless that is None.

    Args:
        layers: of the stage.
    """

    def __init__(self, layers: nn.ModuleList):
        self.entering: Tensor | None = None
        self._leaving: Tensor | None = None
        layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave)

    def take_leaving(self) -> Tensor:
        """The hidden states that the last call of the class computed."""
        assert self._leaving is not None, "the class hasn't been called"
        leaving, self._leaving = self._leaving, None
        return leaving

    def _enter(
        self, _layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.entering is None:
            return None
        if arguments:
            return (self.entering, *arguments[1:]), named
        return arguments, {**named, "hidden_states": self.entering}

    def _leave(self, _layer: nn.Module, _arguments: Any, output: Any) -> None:
        self._leaving = output[0] if isinstance(output, tuple) else output
