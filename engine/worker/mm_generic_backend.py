"""The generic model backend of models that take multimodal inputs: their decoder gets embeddings in place of ids."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.model.runtime.attention_interface import ForwardContext, KVCache
from engine.model.runtime.vocab_shard import VocabShard
from engine.multimodal.families import MMFamily
from engine.worker.generic_backend import GenericBackend
from engine.worker.mm_rows import MMRows
from engine.worker.slots import StepBatch


class MMGenericBackend(GenericBackend):
    """As `GenericBackend`.

    Args:
        decoder: an `engine.model.composed_decoder.ComposedDecoder`.
        cache, vocabulary: of the rank.
        family: of the model.
    """

    def __init__(self, decoder: nn.Module, cache: KVCache, vocabulary: VocabShard | None, family: MMFamily):
        super().__init__(decoder, cache, vocabulary)
        self._embed: nn.Module = decoder.get_input_embeddings()  # type: ignore[operator]
        self._adds = family.added
        self._rows: MMRows | None = None  # of the step that is computed
        if family.deepstack:
            layers: Any = decoder.base_model.layers  # type: ignore[union-attr]
            for i, layer in enumerate(layers):  # prepended: a pipeline stage sends the output with the features
                layer.register_forward_hook(
                    lambda _layer, _inputs, output, i=i: self._deepstack(i, output), prepend=True
                )

    def _context(self, batch: StepBatch) -> ForwardContext:
        context = super()._context(batch)
        if batch.mm is not None:
            context.spans = batch.mm.spans
        return context

    def _arguments(self, batch: StepBatch) -> dict[str, Any]:
        self._rows = batch.mm
        ids = torch.from_numpy(batch.ids)
        positions = batch.positions[None] if batch.rotary_positions is None else batch.rotary_positions[:, None]
        return {
            "inputs_embeds": self._embedded(ids, batch.mm)[None],
            "position_ids": torch.from_numpy(positions),
            "use_cache": False,
        }

    def _embedded(self, ids: Tensor, rows: MMRows | None) -> Tensor:
        """Embeddings of a step's tokens: [tokens, hidden]."""
        if rows is None:
            found: Tensor = self._embed(ids)
            return found
        at = torch.from_numpy(rows.at)
        if self._adds:
            found = self._embed(ids)
            return found.index_add(0, at, rows.embeddings.to(found.dtype))
        # Some checkpoints have no embedding for the token of an input.
        found = self._embed(ids.index_fill(0, at, 0))
        return found.index_copy(0, at, rows.embeddings.to(found.dtype))

    def _deepstack(self, layer: int, output: Tensor) -> Tensor:
        """Add the features of a layer to its output, [1, tokens, hidden]."""
        rows = self._rows
        if rows is None or rows.deepstack is None or layer >= len(rows.deepstack):
            return output
        return output.index_add(1, torch.from_numpy(rows.at), rows.deepstack[layer][None].to(output.dtype))
