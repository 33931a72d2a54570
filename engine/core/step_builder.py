"""Builds step messages: changes are collected while a step is scheduled, and packed when it is complete."""

import numpy as np
from numpy.typing import NDArray

from engine.columns import column, pack_table
from engine.core.kv_cache_manager import KVCacheManager
from engine.core.mm_inputs import EncoderCacheManager
from engine.core.request import Request
from engine.core.slots import Slots
from engine.messages import SlotAssignment, StepMessage

MAX_PLAIN_BLOCKS = 64  # up to this number, packing new blocks takes longer than sending them as they are


class StepBuilder:
    """For workers that keep the state of their slots: only what changed since the last message."""

    def __init__(self, slots: Slots, kv: KVCacheManager, encoder_cache: EncoderCacheManager) -> None:
        self._slots = slots
        self._kv = kv
        self._encoder_cache = encoder_cache
        self._freed: list[int] = []
        self._assigned: list[SlotAssignment] = []

    @property
    def has_freed_slots(self) -> bool:
        """Whether workers need a message even if there is nothing to compute."""
        return bool(self._freed)

    def assign_slot(self, slot: int, request: Request, num_computed_tokens: int) -> None:
        """A request was given a slot, with the KV of `num_computed_tokens` tokens in its blocks."""
        self._assigned.append(self._assignment(slot, request, request.tokens, num_computed_tokens))

    def free_slot(self, slot: int) -> None:
        """A slot was taken from its request."""
        self._freed.append(slot)

    def _assignment(
        self, slot: int, request: Request, tokens: NDArray[np.int32], num_computed_tokens: int
    ) -> SlotAssignment:
        return SlotAssignment(
            slot=slot,
            generation=int(self._slots.generation[slot]),
            tokens=tokens.tobytes(),
            num_prompt_tokens=request.num_prompt_tokens,
            num_computed_tokens=num_computed_tokens,
            block_tables=tuple(map(column, self._kv.block_tables[slot])),
            sampling=request.message.sampling,
            adapter=request.adapter,
            mm_inputs=self._encoder_cache.refs_for_workers(request),
            constrained=request.matcher is not None,
            second_segment=request.message.second_segment,
        )

    def build(
        self, step: int, scheduled: NDArray[np.bool_], chunks: list[tuple[int, int]], num_steps: int
    ) -> StepMessage:
        """Pack the message of a step, or of a burst of `num_steps`, and start the next one.

        Args:
            step: number of the step, the first of a burst.
            scheduled: bool[slots], the slots that compute tokens.
            chunks: slot and number of tokens of each prefill; other scheduled slots compute one token.
            num_steps: more than 1 for a burst.
        """
        idle = np.flatnonzero(self._slots.live & ~scheduled)
        to_encode, evicted = self._encoder_cache.take_step_changes()
        message = StepMessage(
            step=step,
            freed_slots=column(self._freed),
            assigned_slots=tuple(self._assigned),
            new_blocks=_pack_blocks(self._kv.take_appended()),
            chunks=column([(slot, n) for slot, n in chunks if n != 1] + [(slot, 0) for slot in idle.tolist()]),
            num_steps=num_steps,
            free_encoder_keys=evicted,
            encoder_inputs=to_encode,
        )
        self._freed, self._assigned = [], []
        return message


class FullStateStepBuilder(StepBuilder):
    """For V0's workers, which keep nothing: each message has the full state of every request that it computes."""

    def __init__(self, slots: Slots, kv: KVCacheManager, encoder_cache: EncoderCacheManager) -> None:
        super().__init__(slots, kv, encoder_cache)
        self._sent: list[int] = []  # slots in the last message

    def build(
        self, step: int, scheduled: NDArray[np.bool_], chunks: list[tuple[int, int]], num_steps: int
    ) -> StepMessage:
        slots = self._slots
        freed, self._sent = self._sent, np.flatnonzero(scheduled).tolist()
        slots.generation[self._sent] += 1  # no step in flight uses the previous generation
        counts = dict(chunks)
        assigned = []
        for slot in self._sent:
            request = slots.requests[slot]
            assert request is not None, f"slot {slot} has no request"
            tokens = slots.tokens[slot, : slots.num_tokens[slot]]
            num_computed_tokens = int(slots.num_computed_tokens[slot]) - counts.get(slot, num_steps)
            assigned.append(self._assignment(slot, request, tokens, num_computed_tokens))
        self._freed, self._assigned = [], []
        self._kv.take_appended()  # the block tables have them
        to_encode, evicted = self._encoder_cache.take_step_changes()
        return StepMessage(
            step=step,
            freed_slots=column(freed),
            assigned_slots=tuple(assigned),
            chunks=column([(slot, n) for slot, n in chunks if n != 1]),
            num_steps=num_steps,
            free_encoder_keys=evicted,
            encoder_inputs=to_encode,
        )


def _pack_blocks(blocks: list[tuple[int, int, int]]) -> bytes | tuple[int, bytes]:
    count = len(blocks)
    return column(blocks) if count <= MAX_PLAIN_BLOCKS else (count, pack_table(np.array(blocks, np.int32)))
