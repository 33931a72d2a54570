"""The model backends of pipeline stages: hidden states come from the stage before and go to the next one."""

import torch
from torch import Tensor, nn

from engine.kernels.cpu.bindings import Stack, StackSpec
from engine.model.runtime import attention_interface
from engine.model.runtime.attention_interface import KVCache
from engine.model.runtime.stage_states import StageStates
from engine.model.runtime.vocab_shard import VocabShard
from engine.worker.fused_backend import FusedBackend
from engine.worker.generic_backend import GenericBackend
from engine.worker.page_supply import PageSupply
from engine.worker.slots import StepBatch
from engine.worker.stage_links import StageLinks


class GenericStageBackend(GenericBackend):
    """Transformers' class with the layers of one stage.

    Args:
        states: of the class, which puts hidden states in and takes them out.
        width: of a hidden state.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCache,
        vocabulary: VocabShard | None,
        *,
        states: StageStates,
        links: StageLinks,
        width: int,
    ):
        super().__init__(model, cache, vocabulary)
        self._states = states
        self._links = links
        self._width = width

    def forward(self, batch: StepBatch) -> None:
        stage, states = self._links.stage, self._states
        if not stage.is_first:
            states.entering = torch.empty(1, len(batch.ids), self._width, dtype=self._cache.layout.dtype)
            self._links.receive_hidden(states.entering)
        if stage.is_last:
            super().forward(batch)
            return
        base: nn.Module = self._model.base_model  # type: ignore[assignment]
        attention_interface.run_model(base, self._context(batch), self._arguments(batch))
        self._links.send_hidden(states.take_leaving())


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
    ):
        super().__init__(stack, spec, model, vocabulary, pages)
        self._links = links

    def forward(self, batch: StepBatch) -> None:
        self._begin(batch)
        stack, stage, last_layer = self.stack, self._links.stage, self.stack.last_part - 1
        stack.run(0, 0)  # also the rotary positions, which each stage needs
        if stage.is_first:
            self._sum()
        else:
            self._links.receive_hidden(torch.from_numpy(stack.hidden()))
        if self._vocabulary is None:
            stack.run(1, last_layer)
        else:
            for part in range(1, last_layer + 1):
                stack.run(part, part)
                self._sum()
        if stage.is_last:
            stack.run(stack.last_part, stack.last_part)
        else:
            self._links.send_hidden(self._leaving())

    def _sum(self) -> None:
        """Sum what the last part computed over the ranks of the stage."""
        if self._vocabulary is not None:
            self._vocabulary.group.all_reduce(torch.from_numpy(self.stack.partial()))

    def _leaving(self) -> Tensor:
        """The hidden states behind the last layer, in memory of their own: the next step overwrites the stack's."""
        hidden = torch.from_numpy(self.stack.hidden())
        if self._vocabulary is None:
            return hidden.clone()
        return hidden + torch.from_numpy(self.stack.partial())
