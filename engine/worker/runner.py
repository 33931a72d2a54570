"""Runs steps on one device: rows to ragged batch, forward pass, sampling."""

import time
from collections import deque
from typing import Any

import msgspec
import numpy as np
import torch

from engine.config import EngineConfig, ResolvedConfig
from engine.messages import StepMessage, StepResult, TokenLogprobs, column, decode_step, encode, int32s
from engine.model.facts import ModelFacts
from engine.model.shard import Group
from engine.worker import sampler
from engine.worker.network import Built, Network, build_network
from engine.worker.rows import Int64s, Rows, StepBatch


class Runner:
    """The state of one rank: its rows and network, and a step that waits to be sampled."""

    def __init__(self, network: Network, rows: Rows):
        self._network = network
        self._rows = rows
        self._pending: StepBatch | None = None
        self._following: deque[StepMessage] = deque()  # the steps of a burst that haven't run
        self._seconds = 0.0

    @torch.inference_mode()
    def forward(self, message: bytes) -> None:
        """Apply a step message and run the model; its steps are to be sampled before the next message comes."""
        if self._pending is not None and len(self._pending.sampling):
            raise RuntimeError(f"step {self._pending.step} hasn't been sampled")
        if self._following:
            raise RuntimeError(f"step {self._following[0].step} hasn't been sampled")
        first = decode_step(message)
        self._following.extend(first.following())
        self._advance(first)

    def _advance(self, message: StepMessage) -> None:
        began = time.perf_counter()
        batch = self._rows.advance(message)
        if len(batch.rows):
            self._network.forward(batch)
        self._pending = batch
        self._seconds = time.perf_counter() - began

    @torch.inference_mode()
    def sample(self, step: int) -> bytes:
        """Sample the step, book its tokens in the rows, and encode the StepResult; a burst's later steps run here."""
        if self._pending is None and self._following:
            self._advance(self._following.popleft())
        if self._pending is None or self._pending.step != step:
            raise RuntimeError(f"step {step} hasn't run")
        began = time.perf_counter()
        batch, self._pending = self._pending, None
        tokens, logprobs, counts, drafted = np.zeros(0, dtype=np.int64), None, b"", int(batch.drafts.sum())
        if len(batch.sampling):
            if self._rows.plain[batch.sampling].all():
                tokens = self._network.likeliest()
            elif drafted:
                tokens, logprobs = self._sample_beside_drafts(batch)
            else:
                sampled = sampler.sample(self._network.logits(), self._rows, batch.sampling)
                tokens, logprobs = sampled.tokens, sampled.logprobs
            if drafted:
                tokens, each = self._rows.append_verified(batch, tokens)
                counts, logprobs = column(each), _moved(logprobs, np.cumsum(each) - each)
            else:
                self._rows.append(batch.sampling, tokens)
        seconds = self._seconds + time.perf_counter() - began
        return encode(StepResult(step, column(tokens), counts, logprobs, seconds, drafted))

    def _sample_beside_drafts(self, batch: StepBatch) -> tuple[Int64s, TokenLogprobs | None]:
        """Tokens at all of `sampled_at`: the likeliest where rows have guesses or want no more, else sampled."""
        logits = self._network.logits()
        tokens: Int64s = logits.float().numpy().argmax(-1)
        others = ~self._rows.plain[batch.sampling]  # one token each: only plain rows have guesses
        at = (np.cumsum(batch.drafts + 1) - 1)[others]
        sampled = sampler.sample(logits[torch.from_numpy(at)], self._rows, batch.sampling[others])
        tokens[at] = sampled.tokens
        return tokens, _moved(sampled.logprobs, np.flatnonzero(others))


def build_runner(
    config: EngineConfig, facts: ModelFacts, resolved: ResolvedConfig, model: Any, group: Group | None = None
) -> tuple[Runner, Built]:
    """A rank's runner with its network and rows; `facts` are the rank's."""
    built = build_network(config, facts, resolved, model, group)
    rows = Rows(resolved.max_num_seqs, resolved.max_model_len, resolved.block_size, resolved.draft_tokens)
    return Runner(built.network, rows), built


def _moved(logprobs: TokenLogprobs | None, to: Int64s) -> TokenLogprobs | None:
    """With other positions: the one of entry i becomes to[i]."""
    return logprobs and msgspec.structs.replace(logprobs, index=column(to[int32s(logprobs.index)]))
