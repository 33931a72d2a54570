"""The model backends of pipeline stages: hidden states come from the stage before and go to the next one."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.arrays import Int64s
from engine.kernels.cpu.bindings import Stack, StackSpec
from engine.model.runtime import attention_interface
from engine.model.runtime.attention_interface import KVCache
from engine.model.runtime.stage_states import StageStates
from engine.model.runtime.vocab_shard import VocabShard
from engine.worker.fused_backend import FusedBackend
from engine.worker.generic_backend import GenericBackend
from engine.worker.mm_generic_backend import MMGenericBackend
from engine.worker.page_supply import PageSupply
from engine.worker.slots import StepBatch
from engine.worker.stage_links import StageLinks


class GenericStageBackend(GenericBackend):
    """Transformers' class with the layers of one stage.

    Args:
        states: of the class, which puts hidden states in and takes them out.
        width: of a hidden state.
        more: arguments of the next class (`MMGenericStageBackend`).
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        vocabulary: VocabShard | None,
        *more: Any,
        states: StageStates,
        links: StageLinks,
        width: int,
    ):
        super().__init__(model, cache, vocabulary, *more)
        self._states = states
        self._links = links
        self._width = width

    def forward(self, batch: StepBatch) -> None:
        self._receive(batch)
        if self._links.stage.is_last:
            super().forward(batch)
            return
        self._adapters.begin(batch.adapter_slots, batch.row_of)
        base: nn.Module = self._model.base_model  # type: ignore[assignment]
        attention_interface.run_model(base, self._context(batch), self._arguments(batch))
        self._links.send_hidden(self._states.take_leaving())

    def hidden_states(self, batch: StepBatch, at: Int64s) -> Tensor:
        """As in the base class; of the last stage."""
        self._receive(batch)
        return super().hidden_states(batch, at)

    def _receive(self, batch: StepBatch) -> None:
        """Wait for the hidden states of a step, unless this is the first stage."""
        if not self._links.stage.is_first:
            self._states.entering = torch.empty(1, len(batch.ids), self._width, dtype=self._cache.layout.dtype)
            self._links.receive_hidden(self._states.entering)


class MMGenericStageBackend(GenericStageBackend, MMGenericBackend):
    """The same of a model that takes multimodal inputs; the batches of later stages have no embeddings of them."""


class FusedStageBackend(FusedBackend):
    """The fused stack with the layers of one stage. Hidden states are float32 between stages, as within the stack."""

    def __init__(
        self,
        stack: Stack,
        spec: StackSpec,
        model: nn.Module,
        vocabulary: VocabShard | None,
        pages: PageSupply,
        *,
        links: StageLinks,
        adds_inputs: bool = False,
    ):
        super().__init__(stack, spec, model, vocabulary, pages, adds_inputs=adds_inputs)
        self._layers = links.stage.layers
        self._links = links

    def forward(self, batch: StepBatch) -> None:
        self._run_layers(batch)
        if self._links.stage.is_last:
            self.stack.run(self.stack.last_part, self.stack.last_part)
        else:
            self._links.send_hidden(self._leaving())

    def hidden_states(self, batch: StepBatch, at: Int64s) -> Tensor:
        """As in the base class; of the last stage."""
        assert self._vocabulary is None, "ranks that divide a model don't return hidden states"
        self._run_layers(batch)
        return self._normed(at)

    def _run_layers(self, batch: StepBatch) -> None:
        self._begin(batch)
        last_layer = self.stack.last_part - 1
        if self._links.stage.is_first:
            self._run_parts(batch.mm, 0, last_layer)
        else:
            self.stack.run(0, 0)  # the rotary positions
            self._links.receive_hidden(torch.from_numpy(self.stack.hidden()))
            self._run_parts(None, 1, last_layer)

    def _leaving(self) -> Tensor:
        """The hidden states behind the last layer, in memory of their own: the next step overwrites the stack's."""
        hidden = torch.from_numpy(self.stack.hidden())
        if self._vocabulary is None:
            return hidden.clone()
        return hidden + torch.from_numpy(self.stack.partial())
