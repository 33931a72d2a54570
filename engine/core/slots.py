"""The running requests as columns over slots, so that a step over all slots is a few vector operations.

A slot is the place of a running request in the batch state. Its columns count tokens of the request:

    0 ──── num_computed_tokens ──── num_tokens ── num_scheduled_tokens ──── max_num_tokens
    KV scheduled ─┘                   │             │                         └ the request ends here at the latest
    token ids confirmed ──────────────┘             └ num_tokens and the tokens that steps in flight will sample

The next step may compute `num_scheduled_tokens - num_computed_tokens` tokens of a slot: one is a decode, more are a
prefill. A step that computes all of them samples. `num_scheduled_tokens` then grows at once, `num_tokens` when the
sampled token arrives.

Example: a prompt of 40 tokens, at most 12 output tokens, 32 tokens per step, two steps in flight.

    event                                    computed  num_tokens  scheduled  max
    admission                                       0          40         40   52
    step 1 scheduled: a chunk of 32 tokens         32          40         40   52
    step 2 scheduled: 8 tokens, it samples         40          40         41   52
    step 3 scheduled: a decode                     41          40         42   52
    result of step 2: token 41 is known            41          41         42   52
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from engine.core.request import Request
from engine.logprob_columns import PromptLogprobs

MAX_STOP_IDS = 8  # compared for all slots at once; requests with more are checked one by one


class Slots:
    """Columns over `count` slots. They hold the tokens of a request while it runs."""

    def __init__(self, count: int, max_model_len: int):
        self.count = count
        self.live = np.zeros(count, np.bool_)
        self.generation = np.zeros(count, np.int32)  # grows when the slot is freed: results in flight no longer match
        self.handle = np.zeros(count, np.int64)
        self.num_computed_tokens = np.zeros(count, np.int32)
        self.num_tokens = np.zeros(count, np.int32)
        self.num_scheduled_tokens = np.zeros(count, np.int32)
        self.num_pending_steps = np.zeros(count, np.int32)  # steps in flight that sample; only with draft tokens
        self.max_num_tokens = np.zeros(count, np.int32)
        self.num_prompt_tokens = np.zeros(count, np.int32)
        self.min_tokens = np.zeros(count, np.int32)
        self.mm_inputs_end = np.zeros(count, np.int32)  # position after the last placeholder; 0: no multimodal inputs
        self.constrained = np.zeros(count, np.bool_)  # samples with the mask of a grammar
        self.num_cached_blocks = np.zeros(count, np.int32)  # leading blocks that are in the prefix cache
        self.stop_ids = np.full((count, MAX_STOP_IDS), -1, np.int32)
        self.has_many_stop_ids = np.zeros(count, np.bool_)
        self.tokens = np.zeros((count, max_model_len + 1), np.int32)
        self.requests: list[Request | None] = [None] * count
        self.admission_order: dict[int, None] = {}  # live slots, oldest admission first
        self._free = list(range(count - 1, -1, -1))

    @property
    def num_running(self) -> int:
        return len(self.admission_order)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def assign(self, request: Request, num_computed_tokens: int) -> int:
        """Give a request a slot; the KV of its first `num_computed_tokens` tokens is in the cache."""
        slot = self._free.pop()
        message, length = request.message, len(request.tokens)
        self.live[slot] = True
        self.handle[slot] = request.handle
        self.num_computed_tokens[slot] = num_computed_tokens
        self.num_tokens[slot] = self.num_scheduled_tokens[slot] = length
        self.num_pending_steps[slot] = 0
        self.max_num_tokens[slot] = request.max_num_tokens
        self.num_prompt_tokens[slot] = request.num_prompt_tokens
        self.min_tokens[slot] = message.min_tokens
        self.mm_inputs_end[slot] = request.mm_inputs_end
        self.constrained[slot] = request.matcher is not None
        self.num_cached_blocks[slot] = 0
        stop_ids = message.stop_ids[:MAX_STOP_IDS]
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(stop_ids)] = stop_ids
        self.has_many_stop_ids[slot] = len(message.stop_ids) > MAX_STOP_IDS
        self.tokens[slot, :length] = request.tokens
        self.requests[slot] = request
        self.admission_order[slot] = None
        request.slot = slot
        return slot

    def free(self, slot: int) -> Request:
        """Take the slot from its request, which keeps its confirmed tokens."""
        request = self.requests[slot]
        assert request is not None, f"slot {slot} has no request"
        request.tokens = self.tokens[slot, : self.num_tokens[slot]].copy()
        request.slot = -1
        self.requests[slot] = None
        self.live[slot] = False
        self.generation[slot] += 1
        del self.admission_order[slot]
        self._free.append(slot)
        return request

    def find_stopped(self, slots: NDArray[np.intp], tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of `slots` stop at the token that they just received."""
        hit = (self.stop_ids[slots] == tokens[:, None]).any(axis=1)
        for index in np.flatnonzero(self.has_many_stop_ids[slots]):
            request = self.requests[slots[index]]
            hit[index] = request is not None and int(tokens[index]) in request.stop_ids
        if hit.any():
            hit &= self.num_tokens[slots] - self.num_prompt_tokens[slots] >= self.min_tokens[slots]
        return hit

    def with_handles(self, scored: Iterable[PromptLogprobs]) -> tuple[PromptLogprobs, ...]:
        """Replace slots by handles; entries of slots that have another request by now are dropped."""
        return tuple(
            PromptLogprobs(int(self.handle[one.owner]), one.generation, one.logprobs)
            for one in scored
            if self.generation[one.owner] == one.generation
        )

    def check(self, num_blocks: NDArray[np.int32], block_size: int) -> None:
        """Assert the invariants between steps; `num_blocks` of each slot hold `block_size` tokens each."""
        for slot in self.admission_order:
            known, scheduled, most = self.num_tokens[slot], self.num_scheduled_tokens[slot], self.max_num_tokens[slot]
            assert self.live[slot], f"slot {slot} is in admission_order but not live"
            assert self.num_computed_tokens[slot] <= num_blocks[slot] * block_size, f"slot {slot} exceeds its blocks"
            assert known <= scheduled <= most, f"slot {slot}: {known} known, {scheduled} scheduled, {most} at most"
        assert int(self.live.sum()) == len(self.admission_order), "live slots and admission_order disagree"
