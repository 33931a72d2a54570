"""Runs steps on one device: rows to ragged batch, forward pass, sampling."""

import time
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.kernels import attention
from engine.kernels.attention import Ragged, Workspace
from engine.messages import StepMessage, StepResult, column, decode_step, encode
from engine.model import adapt
from engine.model.adapt import Forward, KVCache
from engine.worker import sampler
from engine.worker.rows import Rows, StepBatch


class Runner:
    """The state of one rank: rows, KV cache, and the logits of a step that waits to be sampled."""

    def __init__(self, model: nn.Module, cache: KVCache, rows: Rows):
        self._model = model
        self._cache = cache
        self._rows = rows
        self._workspace = Workspace(cache.layout.dtype)
        self._pending: tuple[StepBatch, Tensor | None] | None = None
        self._following: deque[StepMessage] = deque()  # the steps of a burst that haven't run
        self._seconds = 0.0

    @torch.inference_mode()
    def forward(self, message: bytes) -> None:
        """Apply a step message and run the model; its steps are to be sampled before the next message comes."""
        if self._pending is not None and len(self._pending[0].sampling):
            raise RuntimeError(f"step {self._pending[0].step} hasn't been sampled")
        if self._following:
            raise RuntimeError(f"step {self._following[0].step} hasn't been sampled")
        first = decode_step(message)
        self._following.extend(first.following())
        self._advance(first)

    def _advance(self, message: StepMessage) -> None:
        began = time.perf_counter()
        batch = self._rows.advance(message)
        self._pending = batch, self._run(batch) if len(batch.rows) else None
        self._seconds = time.perf_counter() - began

    @torch.inference_mode()
    def sample(self, step: int) -> bytes:
        """Sample the step, book its tokens in the rows, and encode the StepResult; a burst's later steps run here."""
        if self._pending is None and self._following:
            self._advance(self._following.popleft())
        if self._pending is None or self._pending[0].step != step:
            raise RuntimeError(f"step {step} hasn't run")
        began = time.perf_counter()
        batch, logits = self._pending
        self._pending = None
        tokens, logprobs = np.zeros(0, dtype=np.int64), None
        if logits is not None and len(batch.sampling):
            sampled = sampler.sample(logits, self._rows, batch.sampling)
            tokens, logprobs = sampled.tokens, sampled.logprobs
            self._rows.append(batch.sampling, tokens)
        seconds = self._seconds + time.perf_counter() - began
        return encode(StepResult(step, column(tokens), logprobs=logprobs, seconds=seconds))

    def _run(self, batch: StepBatch) -> Tensor | None:
        """Logits [sampling rows, vocabulary], or None if no row samples."""
        layout = self._cache.layout
        ragged = Ragged(batch.starts, batch.counts, batch.computed, batch.tables)
        index = attention.write_index(batch.tables, batch.row_of, batch.positions, layout)
        forward = Forward(self._cache, ragged, index, self._workspace)
        arguments: dict[str, Any] = {
            "input_ids": torch.from_numpy(batch.ids)[None],
            "position_ids": torch.from_numpy(batch.positions)[None],
            "use_cache": False,
        }
        if not len(batch.sampling):
            adapt.run(self._model.base_model, forward, arguments)  # type: ignore[arg-type]
            return None
        arguments["logits_to_keep"] = torch.from_numpy(batch.sampled_at)
        logits: Tensor = adapt.run(self._model, forward, arguments).logits
        return logits[0]
