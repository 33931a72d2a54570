"""Runs steps on one device: rows to ragged batch, forward pass, sampling."""

import contextlib
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig, ResolvedConfig
from engine.messages import StepMessage, StepResult, TokenLogprobs, column, decode_step, encode, int32s
from engine.model.blank import Blank
from engine.model.facts import ModelFacts
from engine.model.heap import pieces_given_back
from engine.model.split import Split
from engine.worker import prompt_logprobs, sampler
from engine.worker.adapters import Adapters, Share
from engine.worker.network import Built, Network, build_network
from engine.worker.sampler import Float64s
from engine.worker.slots import Int64s, StepBatch, WorkerSlots


@dataclass(frozen=True, slots=True)
class Choice:
    """How tokens at a step's `sampled_at` are chosen: by the network, or from their logits where rows are special.

    temperatures: float32[sampled_at], numbers: float64[sampled_at] in [0, 1), see `Network.choose`; None where all rows
    are special. special: int64[n] into `sampling`; at: int64[n], the same rows' entries of `sampled_at`.
    """

    temperatures: NDArray[np.float32] | None
    numbers: Float64s | None
    special: Int64s
    at: Int64s


class Runner:
    """The state of one rank: its rows and network, and a step that waits to be sampled."""

    def __init__(self, network: Network, slots: WorkerSlots, share: Share | None = None):
        self._network = network
        self._slots = slots
        self._calls = Adapters(network, slots.adapter_slots, share).calls
        self._pending: tuple[StepBatch, Choice] | None = None
        self._following: deque[StepMessage] = deque()  # the steps of a burst that haven't run
        self._seconds = 0.0

    @torch.inference_mode()
    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """Do what isn't a step, between steps; a RedlineError is the caller's."""
        return self._calls[method](**arguments)

    @torch.inference_mode()
    def forward(self, message: bytes) -> None:
        """Apply a step message and run the model; its steps are to be sampled before the next message comes."""
        if self._pending is not None and self.waits_to_be_sampled:
            raise RuntimeError(f"step {self._pending[0].step} hasn't been sampled")
        if self._following:
            raise RuntimeError(f"step {self._following[0].step} hasn't been sampled")
        first = decode_step(message)
        self._following.extend(first.later_steps())
        self._advance(first)

    @property
    def waits_to_be_sampled(self) -> bool:
        return self._pending is not None and len(self._pending[0].logits_at) > 0

    def _advance(self, message: StepMessage) -> None:
        began = time.perf_counter()
        batch = self._slots.begin_step(message)
        choice = self._choice(batch)
        if len(batch.slots):
            self._compute(batch, choice)
        self._pending = batch, choice
        self._seconds = time.perf_counter() - began

    def _compute(self, batch: StepBatch, _choice: Choice) -> None:
        self._network.forward(batch)

    @torch.inference_mode()
    def sample(self, step: int) -> bytes:
        """Sample the step, book its tokens in the rows, and encode the StepResult; a burst's later steps run here."""
        if self._pending is None and self._following:
            self._advance(self._following.popleft())
        if self._pending is None or self._pending[0].step != step:
            raise RuntimeError(f"step {step} hasn't run")
        began = time.perf_counter()
        (batch, choice), self._pending = self._pending, None
        tokens, logprobs, counts, drafted = np.zeros(0, dtype=np.int64), None, b"", int(batch.num_draft_tokens.sum())
        if len(batch.sampling):
            tokens, logprobs = self._choose(batch, choice)
            if drafted:
                tokens, each = self._slots.append_accepted(batch, tokens)
                counts, logprobs = column(each), _moved(logprobs, np.cumsum(each) - each)
            else:
                self._slots.append_tokens(batch.sampling, tokens)
        scored = prompt_logprobs.score(self._network, batch, self._slots) if len(batch.scored_at) else ()
        seconds = self._seconds + time.perf_counter() - began
        refused = column(self._slots.take_rejected())
        return encode(StepResult(step, column(tokens), counts, logprobs, seconds, drafted, refused, scored))

    def close(self) -> None:
        """Nothing comes any more."""

    def _choice(self, batch: StepBatch) -> Choice:
        """A row takes the same way whatever its neighbours ask for: what it samples must not depend on them."""
        slots, which = self._slots, batch.sampling
        special = slots.needs_logits[which]
        last = np.cumsum(batch.num_draft_tokens + 1) - 1  # only plain rows have guesses
        temperatures = numbers = None
        if not special.all():
            temperatures = np.zeros(len(batch.sampled_at), dtype=np.float32)
            temperatures[last] = np.where(special, 0, slots.temperature[which])
            numbers = np.zeros(len(batch.sampled_at))
            numbers[last] = sampler.uniform(slots.seed[which], slots.num_tokens[which] - slots.num_prompt_tokens[which])
        return Choice(temperatures, numbers, np.flatnonzero(special), last[special])

    def _choose(self, batch: StepBatch, choice: Choice) -> tuple[Int64s, TokenLogprobs | None]:
        """Tokens at all of `sampled_at`; logprobs are those of entries of `sampling`."""
        tokens: Int64s = np.zeros(len(batch.sampled_at), dtype=np.int64)
        if choice.temperatures is not None and choice.numbers is not None:
            tokens = self._network.choose(choice.temperatures, choice.numbers)
        if not len(choice.at):
            return tokens, None
        sampled = sampler.sample(self._network.logits(choice.at), self._slots, batch.sampling[choice.special])
        tokens[choice.at] = sampled.tokens
        return tokens, _moved(sampled.logprobs, choice.special)


def build_runner(
    config: EngineConfig, facts: ModelFacts, resolved: ResolvedConfig, blank: Blank, split: Split | None = None
) -> tuple[Runner, Built]:
    """A rank's runner with its network and rows; `facts` are the rank's, `split` is how ranks divide the model."""
    built, share = build_parts(config, facts, resolved, blank, split)
    return Runner(built.network, build_slots(resolved), share), built


def build_parts(
    config: EngineConfig, facts: ModelFacts, resolved: ResolvedConfig, blank: Blank, split: Split | None
) -> tuple[Built, Share | None]:
    """A rank's network, and what of an adapter will be its own."""
    with pieces_given_back(), contextlib.closing(blank):
        built = build_network(config, facts, resolved, blank)
    share = None
    if split is not None and blank.vocabulary is not None:
        share = Share(split, blank.vocabulary, f"{blank.path(blank.model.base_model)}.", blank.model)
    return built, share


def build_slots(resolved: ResolvedConfig) -> WorkerSlots:
    groups = len(resolved.kv_windows)
    return WorkerSlots(
        resolved.max_num_seqs, resolved.max_model_len, resolved.block_size, resolved.draft_tokens, groups
    )


def _moved(logprobs: TokenLogprobs | None, to: Int64s) -> TokenLogprobs | None:
    """With other positions: the one of entry i becomes to[i]."""
    return logprobs and msgspec.structs.replace(logprobs, index=column(to[int32s(logprobs.index)]))
