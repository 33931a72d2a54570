"""Runs steps on one device: rows to ragged batch, forward pass, sampling."""

import contextlib
import time
from collections import deque
from typing import Any

import msgspec
import numpy as np
import torch

from engine.config import EngineConfig, ResolvedConfig
from engine.messages import StepMessage, StepResult, TokenLogprobs, column, decode_step, encode, int32s
from engine.model.blank import Blank
from engine.model.facts import ModelFacts
from engine.model.heap import pieces_given_back
from engine.model.split import Split
from engine.worker import sampler
from engine.worker.adapters import Adapters, Share
from engine.worker.network import Built, Network, build_network
from engine.worker.rows import Int64s, Rows, StepBatch


class Runner:
    """The state of one rank: its rows and network, and a step that waits to be sampled."""

    def __init__(self, network: Network, rows: Rows, share: Share | None = None):
        self._network = network
        self._rows = rows
        self._calls = Adapters(network, rows.slots, share).calls
        self._pending: StepBatch | None = None
        self._following: deque[StepMessage] = deque()  # the steps of a burst that haven't run
        self._seconds = 0.0

    @torch.inference_mode()
    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """Do what isn't a step, between steps; a RedlineError is the caller's."""
        return self._calls[method](**arguments)

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
            tokens, logprobs = self._choose(batch)
            if drafted:
                tokens, each = self._rows.append_verified(batch, tokens)
                counts, logprobs = column(each), _moved(logprobs, np.cumsum(each) - each)
            else:
                self._rows.append(batch.sampling, tokens)
        seconds = self._seconds + time.perf_counter() - began
        return encode(StepResult(step, column(tokens), counts, logprobs, seconds, drafted))

    def _choose(self, batch: StepBatch) -> tuple[Int64s, TokenLogprobs | None]:
        """Tokens at all of `sampled_at`; logprobs are those of entries of `sampling`.

        A row takes the same way whatever its neighbours ask for: what it samples must not depend on them.
        """
        rows, which = self._rows, batch.sampling
        special = rows.special[which]
        last = np.cumsum(batch.drafts + 1) - 1  # only plain rows have guesses
        tokens: Int64s = np.zeros(len(batch.sampled_at), dtype=np.int64)
        if not special.all():
            temperatures = np.zeros(len(tokens), dtype=np.float32)
            temperatures[last] = np.where(special, 0, rows.temperature[which])
            numbers = np.zeros(len(tokens))
            numbers[last] = sampler.uniform(rows.seed[which], rows.num_tokens[which] - rows.prompt_len[which])
            tokens = self._network.choose(temperatures, numbers)
        if not special.any():
            return tokens, None
        at = last[special]
        sampled = sampler.sample(self._network.logits(at), rows, which[special])
        tokens[at] = sampled.tokens
        return tokens, _moved(sampled.logprobs, np.flatnonzero(special))


def build_runner(
    config: EngineConfig, facts: ModelFacts, resolved: ResolvedConfig, blank: Blank, split: Split | None = None
) -> tuple[Runner, Built]:
    """A rank's runner with its network and rows; `facts` are the rank's, `split` is how ranks divide the model."""
    with pieces_given_back(), contextlib.closing(blank):
        built = build_network(config, facts, resolved, blank)
    rows = Rows(
        resolved.max_num_seqs, resolved.max_model_len, resolved.block_size, resolved.draft_tokens,
        len(resolved.kv_windows),
    )  # fmt: skip
    share = None
    if split is not None and blank.vocabulary is not None:
        share = Share(split, blank.vocabulary, f"{blank.path(blank.model.base_model)}.")
    return Runner(built.network, rows, share), built


def _moved(logprobs: TokenLogprobs | None, to: Int64s) -> TokenLogprobs | None:
    """With other positions: the one of entry i becomes to[i]."""
    return logprobs and msgspec.structs.replace(logprobs, index=column(to[int32s(logprobs.index)]))
