"""Runs steps on a rank of a pipeline stage (`--pp`). All stages keep the same state of requests; the last one samples.

The commands of a step come in the same order as without stages: FORWARD 1, SAMPLE 1, FORWARD 2, … A stage that does not
sample only notes at SAMPLE 1 that the tokens of step 1 are still to come, and computes step 2. It receives them before
the first step that needs them. The scheduler lets a slot decode once its last token is known, so by then the last stage
has sent them, and receiving does not wait for it to compute anything.
"""

import dataclasses
from collections import deque

import numpy as np

from engine.arrays import Int64s
from engine.columns import int32s
from engine.messages import StepMessage
from engine.worker.adapter_manager import AdapterManager, AdapterRanks
from engine.worker.kv_blocks import KVBlocks
from engine.worker.model_backend import ModelBackend
from engine.worker.rank_protocol import Features
from engine.worker.runner import Runner, SamplingPlan
from engine.worker.slots import StepBatch, WorkerSlots
from engine.worker.stage_links import StageLinks
from engine.worker.step_runner import StepRunner


class AwaitedTokens:
    """Tokens that the last stage samples and that this one has yet to receive, oldest step first.

    Example: at most three steps are in flight; slot 0 sampled in step 1, slot 1 in step 2.

        step 3 computes slot 1       the tokens of steps 1 and 2 are received before it, since they come in order
        step 3 computes slot 2 only  nothing is received
        step 4                       is submitted only when step 1 is booked, so the tokens of step 1 are received
                                     now at the latest: nothing that was sent may wait for a step that never comes
    """

    def __init__(self, slots: WorkerSlots, links: StageLinks, most_in_flight: int):
        self._slots = slots
        self._links = links
        self._most_in_flight = most_in_flight
        self._steps: deque[tuple[StepBatch, Int64s]] = deque()  # and the generations of the slots that sample

    def add(self, batch: StepBatch) -> None:
        """A step is being sampled by the last stage."""
        if len(batch.sampling):
            self._steps.append((batch, self._slots.generation[batch.sampling].copy()))

    def receive_before(self, message: StepMessage) -> None:
        """Receive the tokens that a step needs, and append them to their slots unless these have other requests."""
        for _ in range(self._num_needed(message)):
            batch, generations = self._steps.popleft()
            slots, drafts = batch.sampling, batch.num_draft_tokens
            tokens = self._links.receive_tokens(len(batch.sampled_at))
            kept = self._slots.live[slots] & (self._slots.generation[slots] == generations)
            slots, drafts, tokens = slots[kept], drafts[kept], tokens[np.repeat(kept, drafts + 1)]
            if drafts.any():  # each stage has proposed the same ones, and finds the same ones accepted
                self._slots.append_accepted(dataclasses.replace(batch, sampling=slots, num_draft_tokens=drafts), tokens)
            else:
                self._slots.append_tokens(slots, tokens)

    def _num_needed(self, message: StepMessage) -> int:
        computes = self._slots.live.copy()  # of the slots that live so far; others have all their tokens
        if message.freed_slots:
            computes[int32s(message.freed_slots)] = False
        if message.chunks:
            chunks = int32s(message.chunks, 2)
            computes[chunks[chunks[:, 1] == 0, 0]] = False
        needed = 0
        for count, (batch, generations) in enumerate(self._steps, 1):
            slots = batch.sampling
            same = self._slots.generation[slots] == generations
            if batch.step <= message.step - self._most_in_flight or (computes[slots] & same).any():
                needed = count
        return needed


class StageRunner(StepRunner[None]):
    """A rank of a stage that does not sample.

    Args:
        backend: sends the hidden states that it computes to the next stage.
        slots: the state of requests.
        links: to the other stages.
        ranks: that have the rest of the model.
        blocks: of the KV cache.
        most_in_flight: `ResolvedConfig.most_steps_in_flight`.
    """

    def __init__(
        self,
        backend: ModelBackend,
        slots: WorkerSlots,
        links: StageLinks,
        ranks: AdapterRanks,
        blocks: KVBlocks,
        most_in_flight: int,
    ):
        super().__init__(AdapterManager(backend, slots.adapter_slots, ranks).calls, blocks)
        self._backend = backend
        self._slots = slots
        self._awaited = AwaitedTokens(slots, links, most_in_flight)

    def _advance(self, message: StepMessage) -> tuple[StepBatch, None]:
        self._awaited.receive_before(message)
        batch = self._slots.begin_step(message)
        self._slots.take_reports()  # the last stage has them too
        if len(batch.slots):
            self._backend.forward(batch)
        return batch, None

    def put_features(self, features: Features) -> None:
        self._slots.put_features(features)

    def sample(self, step: int, masks: bytes = b"") -> bytes:
        """Note that the last stage samples a step. Returns nothing: the result comes from there."""
        del masks
        batch, _ = self._take(step)
        self._awaited.add(batch)
        return b""


class LastStageRunner(Runner):
    """A rank of the last stage."""

    def __init__(
        self, backend: ModelBackend, slots: WorkerSlots, links: StageLinks, ranks: AdapterRanks, blocks: KVBlocks
    ):
        super().__init__(backend, slots, ranks, blocks)
        self._links = links

    def _advance(self, message: StepMessage) -> tuple[StepBatch, SamplingPlan]:
        waited = self._links.waited_s
        found = super()._advance(message)
        self._seconds -= self._links.waited_s - waited  # the time of the device is without that of other stages
        return found

    def _append(self, batch: StepBatch, tokens: Int64s) -> None:
        self._links.send_tokens(tokens)
        super()._append(batch, tokens)

    def _append_accepted(self, batch: StepBatch, tokens: Int64s) -> tuple[Int64s, Int64s]:
        self._links.send_tokens(tokens)
        return super()._append_accepted(batch, tokens)
