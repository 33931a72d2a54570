"""Bookkeeping for speculation: workers propose draft tokens and keep those that the model accepts.

The number of tokens that a step yields is known only with its result, and by then the next step is scheduled. While
steps are in flight, `num_computed_tokens` and `num_scheduled_tokens` of such a slot are therefore upper bounds, which
assume that all draft tokens are accepted. They are updated whenever a step is scheduled or a result arrives. A worker
never proposes tokens beyond the blocks of the slot.

Example: 2 draft tokens per step, 10 known tokens, 4 blocks of 4 tokens. With one step in flight at most 3 tokens are
added, so `num_computed_tokens` is 9 + 3 = 12; with two steps, 9 + 6 = 15.
"""

import numpy as np
from numpy.typing import NDArray

from engine.columns import int32s
from engine.core.slots import Slots
from engine.messages import StepResult


class DraftTokenTracker:
    """Sets the bounds of slots that sample, and books their results."""

    def __init__(self, slots: Slots, num_blocks: NDArray[np.int32], max_draft_tokens: int, block_size: int):
        """`num_blocks` is that of KVCacheManager; `max_draft_tokens` is per slot and step."""
        self._slots = slots
        self._num_blocks = num_blocks
        self._max_draft_tokens = max_draft_tokens
        self._block_size = block_size
        self.num_draft_tokens = self.num_accepted_tokens = 0  # since the start

    def step_scheduled(self, sampling: NDArray[np.intp]) -> None:
        """A step was scheduled that samples for these slots."""
        self._slots.num_pending_steps[sampling] += 1
        self._set_bounds(sampling)

    def _set_bounds(self, at: NDArray[np.intp]) -> None:
        slots = self._slots
        bound = slots.num_tokens[at] - 1 + slots.num_pending_steps[at] * (1 + self._max_draft_tokens)
        in_blocks = np.minimum(bound, self._num_blocks[at] * self._block_size)
        slots.num_computed_tokens[at] = np.minimum(in_blocks, slots.max_num_tokens[at] - 1)
        slots.num_scheduled_tokens[at] = slots.num_computed_tokens[at] + 1

    def book_result(
        self, at: NDArray[np.intp], kept_slots: NDArray[np.bool_], result: StepResult
    ) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.bool_]]:
        """Book the tokens of a step.

        Args:
            at: the slots that sampled in the step and still have the same request.
            kept_slots: bool, over all slots that sampled: which of them are in `at`.
            result: the step's result.

        Returns which of the result's tokens count, how many each slot of `at` got, and which slots reached a stop id.
        """
        tokens, slots = int32s(result.tokens), self._slots
        counts = int32s(result.counts) if result.counts else np.ones(len(kept_slots), np.int32)
        begins = (np.cumsum(counts) - counts)[kept_slots].tolist()
        kept = np.zeros(len(tokens), np.bool_)
        got, stopped = np.zeros(len(at), np.int32), np.zeros(len(at), np.bool_)
        for i, (slot, begin, count) in enumerate(zip(at.tolist(), begins, counts[kept_slots].tolist(), strict=True)):
            count = min(count, int(slots.max_num_tokens[slot] - slots.num_tokens[slot]))
            for token in tokens[begin : begin + count]:
                slots.tokens[slot, slots.num_tokens[slot]] = token
                slots.num_tokens[slot] += 1
                got[i] += 1
                if slots.find_stopped(at[i : i + 1], token[None])[0]:
                    stopped[i] = True
                    break
            kept[begin : begin + int(got[i])] = True
        slots.num_pending_steps[at] -= 1
        self._set_bounds(at)
        self.num_draft_tokens += result.num_draft_tokens
        self.num_accepted_tokens += len(tokens) - len(kept_slots)
        return kept, got, stopped
