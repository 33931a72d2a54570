"""The generic model backend: transformers' own class with paged attention in torch."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.arrays import Float32s, Float64s, Int64s
from engine.grammar import RowMasks
from engine.kernels.attention import Ragged, Workspace
from engine.model.lora.lora_hooks import LoraHooks
from engine.model.lora.lora_weights import Adapter
from engine.model.runtime import attention_interface
from engine.model.runtime.attention_interface import ForwardContext, KVCache
from engine.model.runtime.vocab_shard import VocabShard
from engine.worker.sampler import BATCH_ROWS, pick, weigh
from engine.worker.slots import StepBatch


class GenericBackend:
    """The reference, and the backend of every model that the fused stack does not support."""

    def __init__(self, model: nn.Module, cache: KVCache, vocabulary: VocabShard | None):
        self._model = model
        self._cache = cache
        self._vocabulary = vocabulary
        self._adapters = LoraHooks(model)
        self._workspace = Workspace(cache.layout.dtype)
        self._logits: Tensor | None = None

    def forward(self, batch: StepBatch) -> None:
        self._logits = None
        self._adapters.begin(batch.adapter_slots, batch.row_of)
        forward, arguments = self._context(batch), self._arguments(batch)
        logits_at = batch.logits_at
        if not len(logits_at):
            attention_interface.run_model(self._model.base_model, forward, arguments)  # type: ignore[arg-type]
            return
        arguments["logits_to_keep"] = torch.from_numpy(logits_at)
        self._logits = attention_interface.run_model(self._model, forward, arguments).logits[0]

    def hidden_states(self, batch: StepBatch, at: Int64s) -> Tensor:
        """Compute a step without logits. Returns the last hidden states at some of its tokens, float32 [len(at), …]."""
        self._adapters.begin(batch.adapter_slots, batch.row_of)
        forward, arguments = self._context(batch), self._arguments(batch)
        base: nn.Module = self._model.base_model  # type: ignore[assignment]
        hidden: Tensor = attention_interface.run_model(base, forward, arguments).last_hidden_state[0]
        return hidden[torch.from_numpy(at)].float()

    def _context(self, batch: StepBatch) -> ForwardContext:
        ragged = Ragged(batch.starts, batch.counts, batch.num_computed_tokens, batch.tables)
        return ForwardContext.build(self._cache, ragged, batch.row_of, batch.positions, self._workspace)

    def _arguments(self, batch: StepBatch) -> dict[str, Any]:
        """What the model gets, but for `logits_to_keep`."""
        return {
            "input_ids": torch.from_numpy(batch.ids)[None],
            "position_ids": torch.from_numpy(batch.positions)[None],
            "use_cache": False,
        }

    def add_adapter(self, slot: int, adapter: Adapter) -> None:
        self._adapters.add(slot, adapter)

    def drop_adapter(self, slot: int) -> None:
        self._adapters.drop(slot)

    def logits(self, which: Int64s) -> Tensor:
        assert self._logits is not None
        some = self._logits if len(which) == len(self._logits) else self._logits[torch.from_numpy(which)]
        return some if self._vocabulary is None else self._vocabulary.gather(some)

    def choose(self, temperatures: Float32s, uniforms: Float64s, masks: RowMasks | None = None) -> Int64s:
        if masks is not None:
            self._exclude(masks)
        if self._vocabulary is not None:
            draw = functools.partial(self._draw, temperatures)
            return self._vocabulary.choose(self._greedy(temperatures), temperatures, uniforms, draw)
        tokens = self._greedy(temperatures)[1]
        drawn = np.flatnonzero(temperatures)
        tokens[drawn] = self._draw(temperatures, drawn, uniforms[drawn])
        return tokens

    def _exclude(self, masks: RowMasks) -> None:
        """Give the tokens that masks exclude a logit of -inf; nobody else reads the logits of these rows."""
        assert self._logits is not None
        if self._vocabulary is not None:
            masks = masks.of_tokens(self._vocabulary.first, self._vocabulary.count)
        for number, row in enumerate(masks.at.tolist()):
            excluded = ~masks.accepted(number, self._logits.shape[1])
            self._logits[row].masked_fill_(torch.from_numpy(excluded), -torch.inf)

    def _greedy(self, temperatures: Float32s) -> tuple[Float32s, Int64s, Float32s]:
        """For each sample: the highest logit, its token, and the sum of all weights relative to it.

        Only ranks that divide the vocabulary need the sum, and only for samples with a temperature above 0.
        """
        assert self._logits is not None
        samples = len(temperatures)
        tokens, tops, weights = (
            np.empty(samples, np.int64),
            np.empty(samples, np.float32),
            np.zeros(samples, np.float32),
        )
        for start in range(0, samples, BATCH_ROWS):
            some = slice(start, start + BATCH_ROWS)
            part = self._logits[:samples][some].float()
            # numpy's argmax is several times as fast as torch's, row by row.
            tokens[some] = part.numpy().argmax(-1)
            tops[some] = np.take_along_axis(part.numpy(), tokens[some, None], 1)[:, 0]
            drawn = np.flatnonzero(temperatures[some]) if self._vocabulary is not None else np.zeros(0, np.int64)
            if len(drawn):
                weights[some][drawn] = weigh(part[torch.from_numpy(drawn)], temperatures[some][drawn]).sum(-1).numpy()
        return tops, tokens, weights

    def _draw(self, temperatures: Float32s, which: Int64s, uniforms: Float64s) -> Int64s:
        """Draw a token for some of the samples. Where ranks divide the vocabulary, from this rank's tokens.

        Args:
            temperatures: of all samples.
            which: int64[n], the samples to draw for.
            uniforms: [n], numbers in [0, 1).
        """
        assert self._logits is not None
        tokens = np.empty(len(which), dtype=np.int64)
        for start in range(0, len(which), BATCH_ROWS):
            some = slice(start, start + BATCH_ROWS)
            part = self._logits[torch.from_numpy(which[some])].float()
            tokens[some] = pick(weigh(part, temperatures[which[some]]), uniforms[some])
        return tokens
