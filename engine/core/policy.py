"""Scheduling policies: what V1 does, and what the ablations that make V1 into V0 do instead.

A `SchedulingPolicy` has one object per decision. They are chosen once, when the scheduler is created, so no step checks
for ablations.

    decision        V1                       ablation or option
    batch_order     MixedBatches             PrefillFirst              prefill-first
    chunking        ChunkedPrefill           WholePrompts              no-chunking, pooling of all hidden states
    bursts          LatencyBoundBursts       FixedBursts               no-run-ahead, full-state, --speculative, --pp
    watermark       Watermark(0)             Watermark(1 %)            watermark
    queue_order     FirstComeFirstServed     PriorityOrder             --scheduling-policy priority
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.config import watermark_blocks
from engine.core.slots import Slots
from engine.core.waiting_queue import PriorityQueue, WaitingQueue, priority_key
from engine.resolved_config import ResolvedConfig

# A burst has as many steps as end within this time, so a request that arrives in the meantime waits no longer. More
# than 8 steps save hardly anything more.
BURST_S = 0.010
MAX_BURST = 8

Chunks = list[tuple[int, int]]  # slot, number of tokens


class BatchScheduler(Protocol):
    """The operations of the scheduler that a batch order combines; see `engine.core.scheduler.Scheduler`."""

    max_num_batched_tokens: int

    def allocate_window_blocks(self) -> bool: ...

    def allocate_decode_blocks(self) -> bool: ...

    def schedule_decodes(self) -> NDArray[np.intp]: ...

    def continue_prefills(self, budget: int, chunks: Chunks) -> int: ...

    def admit_waiting(self, budget: int, chunks: Chunks, now: float) -> None: ...


class BatchOrder(Protocol):
    """Which work goes into a step first."""

    def schedule_batch(self, scheduler: BatchScheduler, chunks: Chunks, now: float) -> NDArray[np.intp]:
        """Schedule one step: append its prefills to `chunks`, and return the slots that decode."""
        ...


class MixedBatches:
    """Running requests first: decodes, then prefills in progress, then waiting requests, in one token budget."""

    def schedule_batch(self, scheduler: BatchScheduler, chunks: Chunks, now: float) -> NDArray[np.intp]:
        preempted = scheduler.allocate_window_blocks() | scheduler.allocate_decode_blocks()
        decoding = scheduler.schedule_decodes()
        budget = scheduler.max_num_batched_tokens - len(decoding)
        assert budget >= 0, f"{len(decoding)} slots decode, the budget is {scheduler.max_num_batched_tokens}"
        budget = scheduler.continue_prefills(budget, chunks)
        if not preempted:
            scheduler.admit_waiting(budget, chunks, now)
        return decoding


class PrefillFirst:
    """V0: no request decodes in a step that computes prompts."""

    def schedule_batch(self, scheduler: BatchScheduler, chunks: Chunks, now: float) -> NDArray[np.intp]:
        preempted = scheduler.allocate_window_blocks()
        budget = scheduler.continue_prefills(scheduler.max_num_batched_tokens, chunks)
        if not preempted:
            scheduler.admit_waiting(budget, chunks, now)
        if chunks:
            return np.empty(0, np.intp)
        scheduler.allocate_decode_blocks()
        return scheduler.schedule_decodes()


class Chunking(Protocol):
    """How prompts are divided over steps."""

    whole_prompts: bool

    def chunk_size(self, num_owed: int, num_possible: int, /) -> int:
        """How many tokens of a prefill a step computes, of `num_owed`, if at most `num_possible` can be."""
        ...


class ChunkedPrefill:
    """As many tokens as the budget allows."""

    whole_prompts = False

    def chunk_size(self, _num_owed: int, num_possible: int, /) -> int:
        return num_possible


class WholePrompts:
    """V0: a prompt is computed in one step."""

    whole_prompts = True

    def chunk_size(self, num_owed: int, num_possible: int, /) -> int:
        return num_possible if num_possible == num_owed else 0


class Bursts(Protocol):
    """How many decode steps are scheduled at once."""

    although_requests_wait: bool
    results_together: bool  # results are booked when the last one has arrived

    def max_steps(self, decode_step_s: float, /) -> int:
        """The most steps, given the duration of one; 0.0 while that isn't known."""
        ...


class LatencyBoundBursts:
    """As many steps as end within BURST_S, if no request waits."""

    although_requests_wait = False
    results_together = False

    def max_steps(self, decode_step_s: float, /) -> int:
        return min(MAX_BURST, max(1, int(BURST_S / decode_step_s))) if decode_step_s > 0 else 1


class FixedBursts:
    """V0: always the same number of steps, whose tokens are sent together."""

    although_requests_wait = True

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self.results_together = num_steps > 1

    def max_steps(self, _decode_step_s: float, /) -> int:
        return self._num_steps


@dataclass(frozen=True, slots=True)
class Watermark:
    """Blocks that stay free when a request is admitted, for the growth of the running ones."""

    num_blocks: int

    def num_reserved_blocks(self, num_running: int) -> int:
        return self.num_blocks if num_running else 0


class QueueOrder(Protocol):
    """Which waiting request is admitted first, and which running one is preempted first."""

    def make_queue(self) -> WaitingQueue: ...

    def choose_victim(self, slots: Slots) -> int:
        """The slot to preempt; at least one is live."""
        ...


class FirstComeFirstServed:
    """In order of arrival; the newest request is preempted."""

    def make_queue(self) -> WaitingQueue:
        return deque()

    def choose_victim(self, slots: Slots) -> int:
        return next(reversed(slots.admission_order))


class PriorityOrder:
    """By priority, then by arrival; the last in this order is preempted."""

    def make_queue(self) -> WaitingQueue:
        return PriorityQueue()

    def choose_victim(self, slots: Slots) -> int:
        def key(slot: int) -> tuple[int, float, int]:
            request = slots.requests[slot]
            assert request is not None, f"slot {slot} has no request"
            return priority_key(request)

        return max(slots.admission_order, key=key)


@dataclass(frozen=True, slots=True)
class SchedulingPolicy:
    """The decisions of one engine."""

    batch_order: BatchOrder
    chunking: Chunking
    bursts: Bursts
    watermark: Watermark
    queue_order: QueueOrder
    steps_in_flight: int
    full_state: bool  # each step message has the full state of its requests
    decodes_ahead: bool  # a slot may be scheduled again before the token of its last step is known

    @classmethod
    def from_resolved(cls, config: ResolvedConfig) -> "SchedulingPolicy":
        ablations = config.ablations
        # A message with the full state needs the sampled tokens of the previous step.
        run_ahead = not ablations & {"no-run-ahead", "full-state"}
        # A burst requires that each of its steps yields one token, which isn't so with draft tokens, and that a rank
        # knows this token, which isn't so if another pipeline stage samples it.
        one_stage = config.pipeline_stages == 1
        bursts = run_ahead and not config.draft_tokens and one_stage
        whole_prompts = config.whole_prompts or "no-chunking" in ablations
        return cls(
            batch_order=PrefillFirst() if "prefill-first" in ablations else MixedBatches(),
            chunking=WholePrompts() if whole_prompts else ChunkedPrefill(),
            bursts=LatencyBoundBursts() if bursts else FixedBursts(config.scheduler_steps),
            watermark=Watermark(watermark_blocks(config.num_blocks) if "watermark" in ablations else 0),
            queue_order=PriorityOrder() if config.scheduling_policy == "priority" else FirstComeFirstServed(),
            steps_in_flight=config.most_steps_in_flight if run_ahead else 1,
            full_state="full-state" in ablations,
            decodes_ahead=one_stage,
        )
