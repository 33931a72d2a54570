"""Computes the vectors of prompts: pooled hidden states of a decoder, or the class of an encoder."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Int64s
from engine.pooling import PoolingSpec
from engine.worker.slots import StepBatch


class HiddenStates(Protocol):
    """A model backend that can stop before the logits."""

    def hidden_states(self, batch: StepBatch, at: Int64s) -> Tensor:
        """Compute a step; the last hidden states at some of its tokens, float32 [len(at), hidden]."""
        ...


class PoolingBackend(Protocol):
    """Computes steps of a model that pools."""

    def pool(self, batch: StepBatch, second_segments: Int64s) -> Tensor:
        """Compute a step.

        Args:
            batch: of the step.
            second_segments: [rows], position of the first token of type 1 in each prompt; 0: there is none.

        Returns:
            The vectors of the slots `batch.sampling`, float32 [n, width].
        """
        ...


POOL: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
}


class DecoderPooling:
    """Pools the hidden states of a decoder, whose steps are those of a model that generates.

    Args:
        backend: of the decoder.
        spec: how it pools.
        head: float32 [labels, hidden], of a classifier.
    """

    def __init__(self, backend: HiddenStates, spec: PoolingSpec, head: Tensor | None):
        self._backend = backend
        self._spec = spec
        self._head = head

    def pool(self, batch: StepBatch, second_segments: Int64s) -> Tensor:
        del second_segments  # decoders have no token types
        if self._spec.method == "last":
            vectors = self._backend.hidden_states(batch, batch.sampled_at)
        else:
            hidden = self._backend.hidden_states(batch, np.arange(len(batch.ids)))
            vectors = torch.stack([POOL[self._spec.method](one) for one in hidden.split(batch.counts.tolist())])
        if self._head is None or not len(vectors):
            return vectors
        return torch.stack([self._head @ one for one in vectors])  # one by one: neighbors don't change the rounding


class EncoderPooling:
    """An encoder as transformers' class. Each prompt is computed alone, so that no other one changes its vector.

    Args:
        model: the filled class.
        spec: how it pools.
    """

    def __init__(self, model: Any, spec: PoolingSpec):
        self._model = model
        self._spec = spec
        types = getattr(model.config, "type_vocab_size", None) or 0
        self._has_types = types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters

    def pool(self, batch: StepBatch, second_segments: Int64s) -> Tensor:
        assert len(batch.sampling) == len(batch.slots), "a prompt was divided over steps"
        prompts = torch.from_numpy(batch.ids).split(batch.counts.tolist())
        pairs = zip(prompts, second_segments.tolist(), strict=True)
        return torch.stack([self._compute(ids[None], second) for ids, second in pairs])

    def _compute(self, ids: Tensor, second_segment: int) -> Tensor:
        arguments = {"input_ids": ids}
        if second_segment and self._has_types:
            arguments["token_type_ids"] = (torch.arange(ids.shape[1]) >= second_segment).long()[None]
        outputs = self._model(**arguments)
        if self._spec.method == "head":
            logits: Tensor = outputs.logits[0]
            return logits.float()
        return POOL[self._spec.method](outputs.last_hidden_state[0].float())
