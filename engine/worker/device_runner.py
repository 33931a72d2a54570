"""Runs steps on an asynchronous device: enqueues them without waiting for their tokens.

`sample` enqueues the choice of tokens and returns a `PendingResult`, whose `finish` another thread calls; it waits for
the device. Meanwhile the next step is laid out with counts alone: its unknown tokens are looked up on the device.

Some steps need the tokens of earlier steps, or logits, on the host: those with rows that sample on the host (penalties,
bias, logprobs, …), with prompt logprobs or with draft tokens. `sample` waits for the device then. Masks of grammars are
copied to the device, where they exclude tokens before the others are chosen from.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Int64s
from engine.columns import column
from engine.grammar import TokenMasks
from engine.logprob_columns import PromptLogprobs, TokenLogprobs
from engine.messages import StepMessage, StepReports, StepResult, encode
from engine.worker import prompt_logprobs, sampler
from engine.worker.adapter_manager import AdapterManager, AdapterSharding
from engine.worker.device import Device, Fetched, Mark
from engine.worker.device_backend import DeviceBackend
from engine.worker.device_slots import AppendedTokens, DeviceSlots
from engine.worker.device_steps import DeviceSteps
from engine.worker.kv_blocks import KVBlocks
from engine.worker.rank_barrier import barrier_calls
from engine.worker.rank_protocol import Features
from engine.worker.runner import reindexed
from engine.worker.slots import StepBatch
from engine.worker.step_inputs import StepInputs
from engine.worker.step_runner import StepRunner


@dataclass(slots=True)
class PendingResult:
    """The result of a step that the device computes. `tokens`: on the way from the device, or known: int64[n]."""

    step: int
    device: Device
    began: Mark
    tokens: Fetched | Int64s
    reports: StepReports | None
    ended: Mark = None
    counts: bytes = b""
    logprobs: TokenLogprobs | None = None
    num_draft_tokens: int = 0
    scored: tuple[PromptLogprobs, ...] = ()

    def finish(self) -> bytes:
        """Wait for the device and encode the StepResult. May be called by any thread."""
        tokens = self.tokens if isinstance(self.tokens, np.ndarray) else self.tokens.wait().numpy()
        seconds = self.device.elapsed(self.began, self.ended)
        drafted, reports = self.num_draft_tokens, self.reports
        return encode(
            StepResult(self.step, column(tokens), self.counts, self.logprobs, seconds, drafted, reports, self.scored)
        )


_Enqueued = tuple[StepInputs | None, Mark]  # None: the step computes nothing; the mark before it


class DeviceRunner(StepRunner[_Enqueued]):
    """The state of one rank, with the interface of `engine.worker.runner.Runner` but for what `sample` returns."""

    def __init__(
        self,
        device: Device,
        backend: DeviceBackend,
        slots: DeviceSlots,
        steps: DeviceSteps,
        sharding: AdapterSharding | None = None,
        blocks: KVBlocks | None = None,
    ):
        adapters = AdapterManager(backend, slots.adapter_slots, sharding)
        calls = {**adapters.calls, **barrier_calls(sharding), "capture_graph": self._capture_graph}
        super().__init__(calls, blocks)
        self._device = device
        self._backend = backend
        self._slots = slots
        self._steps = steps
        self._unfilled: deque[tuple[AppendedTokens, Fetched]] = deque()  # tokens on the way to the slots

    @property
    def captures(self) -> bool:
        """Whether steps are left to be captured."""
        return self._steps.num_left > 0

    def _advance(self, message: StepMessage) -> tuple[StepBatch, _Enqueued]:
        self._fill(wait=self._slots.proposes_drafts)
        began = self._device.clock()
        batch = self._slots.begin_step(message)
        inputs = None
        if len(batch.slots):
            inputs = self._steps.forward(batch)
        return batch, (inputs, began)

    @torch.inference_mode()
    def sample(self, step: int, masks: bytes = b"") -> PendingResult:
        """Enqueue the choice of a step's tokens. Later steps of a burst run here."""
        batch, (inputs, began) = self._take(step)
        result = PendingResult(step, self._device, began, np.zeros(0, dtype=np.int64), self._slots.take_reports())
        if inputs is not None and len(batch.logits_at):
            given = TokenMasks(masks) if masks else None
            if given is not None:
                self._exclude(batch, given)
            if self._needs_host(batch):
                self._sample_on_host(batch, inputs, result, given)
            else:
                self._sample_ahead(batch, inputs, result)
        result.ended = self._device.clock()
        return result

    def put_features(self, features: Features) -> None:
        self._slots.put_features(features)

    def _capture_graph(self) -> int:
        """Capture one of the steps that are left, unless a step waits to be sampled; returns how many are left."""
        if not self.waits_to_be_sampled:
            self._steps.capture_next()
        return self._steps.num_left

    def _needs_host(self, batch: StepBatch) -> bool:
        drafted = len(batch.sampled_at) > len(batch.sampling)
        return drafted or len(batch.scored_at) > 0 or bool(self._slots.needs_logits[batch.sampling].any())

    def _exclude(self, batch: StepBatch, masks: TokenMasks) -> None:
        """Enqueue the masks of the rows whose tokens the device chooses."""
        device_rows = ~self._slots.needs_logits[batch.sampling]
        masked = masks.of(batch.sampling[device_rows], _last(batch)[device_rows])
        if masked is not None:
            self._steps.exclude(masked)

    def _sample_ahead(self, batch: StepBatch, inputs: StepInputs, result: PendingResult) -> None:
        result.tokens = self._device.fetch(self._steps.choose(inputs))
        self._unfilled.append((self._slots.extend(batch.sampling), result.tokens))

    def _sample_on_host(
        self, batch: StepBatch, inputs: StepInputs, result: PendingResult, masks: TokenMasks | None
    ) -> None:
        """Wait for the tokens of all steps, this one included; the slots know them when the next one is laid out."""
        tokens = self._device.fetch(self._steps.choose(inputs)).wait().numpy().astype(np.int64)
        self._fill(wait=True)
        slots, which, logits = self._slots, batch.sampling, HostLogits(self._device, self._backend)
        special = np.flatnonzero(slots.needs_logits[which])
        if len(special):
            at = _last(batch)[special]
            sampled = sampler.sample(logits.logits(at), slots, which[special], masks)
            tokens[at] = sampled.tokens
            result.logprobs = reindexed(sampled.logprobs, special)
        result.num_draft_tokens = int(batch.num_draft_tokens.sum())
        if result.num_draft_tokens:
            tokens, each = slots.append_accepted(batch, tokens)
            result.counts, result.logprobs = column(each), reindexed(result.logprobs, np.cumsum(each) - each)
        else:
            slots.append_tokens(which, tokens)
        result.tokens = tokens
        if len(batch.scored_at):
            result.scored = prompt_logprobs.score(logits, batch, slots)

    def _fill(self, *, wait: bool) -> None:
        """Write the ids of tokens that have arrived into the slots, or with `wait` of all tokens."""
        while self._unfilled and (wait or self._unfilled[0][1].ready()):
            appended, fetched = self._unfilled.popleft()
            self._slots.fill(appended, fetched.wait().numpy())


def _last(batch: StepBatch) -> Int64s:
    """The entry of `sampled_at` behind the draft tokens of each slot that samples."""
    return np.cumsum(batch.num_draft_tokens + 1) - 1


class HostLogits:
    """Logits of the last step, fetched to the host."""

    def __init__(self, device: Device, backend: DeviceBackend):
        self._device = device
        self._backend = backend

    def logits(self, which: Int64s) -> Tensor:
        return self._device.fetch(self._backend.logits(which)).wait()
