"""A worker's slots: the state of all running requests, kept here so that a step message has only what changed.

A step is a ragged batch: the tokens of its slots laid end to end. Example: slot 0 decodes its token 6, slot 2 computes
tokens 0 to 2 of a prompt of 5, slot 3 is idle.

    slots                 [0, 2]
    counts                [1, 3]            new tokens of each
    starts                [0, 1]            where they begin in the batch
    num_computed_tokens   [6, 0]            before the step
    row_of                [0, 1, 1, 1]      index into `slots` of each token
    positions             [6, 0, 1, 2]
    sampling, sampled_at  [0], [0]          slot 2 has tokens left to compute, so it does not sample
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.arrays import Int32s, Int64s
from engine.columns import column, int32s
from engine.messages import Sampling, SlotAssignment, StepMessage, StepReports
from engine.worker.mm_rows import MMRows
from engine.worker.ngram_proposer import drafts_per_request, propose
from engine.worker.rank_protocol import Features


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The tokens of one step, slots ascending and laid end to end. A batch row is an index into `slots`.

    slots, starts, counts, num_computed_tokens: int64[rows]; tables: int32[KV groups, rows, blocks];
    row_of: int64[tokens], the batch row of each; ids, positions: int64[tokens];
    adapter_slots: int64[rows], -1 without an adapter; None: no row has one.
    sampling: int64[n], the slots that sample; num_draft_tokens: int64[n], how many of the last tokens of each are draft
    tokens (see `engine.worker.ngram_proposer`); sampled_at: int64[n + draft tokens], the tokens whose logits they use.
    scored_at: int64[m], the tokens before prompt tokens whose logprobs were requested. Both are indices into the batch.
    mm: tokens with embeddings of multimodal inputs; None: none in this step. rotary_positions: int64[3, tokens], time,
    height and width of models with M-RoPE; None for other models, which rotate by `positions`.
    """

    step: int
    slots: Int64s
    starts: Int64s
    counts: Int64s
    num_computed_tokens: Int64s
    tables: Int32s
    row_of: Int64s
    ids: Int64s
    positions: Int64s
    adapter_slots: Int64s | None
    sampling: Int64s
    num_draft_tokens: Int64s
    sampled_at: Int64s
    scored_at: Int64s
    mm: MMRows | None = None
    rotary_positions: Int64s | None = None

    @property
    def logits_at(self) -> Int64s:
        """Indices of the tokens whose logits are needed: `sampled_at`, then `scored_at`."""
        return np.concatenate((self.sampled_at, self.scored_at)) if len(self.scored_at) else self.sampled_at


_NONE: Int64s = np.zeros(0, dtype=np.int64)
_NO_LIMIT = 2**31  # blocks of a slot, if the model has no KV cache, and thus no KV groups


class WorkerSlots:
    """Columns over slots. The scheduler alone numbers and reuses them (see `engine.core.slots`).

    Args:
        max_slots: `max_num_seqs`.
        max_model_len: tokens of one request.
        block_size: tokens of one KV block.
        max_draft_tokens: most draft tokens per slot and step.
        num_groups: KV groups, each with a block table for every slot.
    """

    def __init__(
        self, max_slots: int, max_model_len: int, block_size: int, max_draft_tokens: int = 0, num_groups: int = 1
    ):
        self._max_draft_tokens = max_draft_tokens
        max_blocks = -(-max_model_len // block_size) + 1
        self.block_size = block_size
        self.tokens: Int32s = np.zeros((max_slots, max_model_len + 1), dtype=np.int32)
        self.block_tables: Int32s = np.zeros((num_groups, max_slots, max_blocks), dtype=np.int32)
        self.num_tokens: Int64s = np.zeros(max_slots, dtype=np.int64)
        self.num_prompt_tokens: Int64s = np.zeros(max_slots, dtype=np.int64)
        self.num_computed_tokens: Int64s = np.zeros(max_slots, dtype=np.int64)
        self.num_blocks: Int64s = np.zeros((num_groups, max_slots), dtype=np.int64)
        self.generation: Int64s = np.full(max_slots, -1, dtype=np.int64)
        self.live: NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)
        self.sampling: list[Sampling] = [Sampling()] * max_slots
        self.constrained: NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)  # samples with a mask
        self.is_plain_greedy: NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)
        self.needs_logits: NDArray[np.bool_] = np.zeros(max_slots, dtype=np.bool_)
        self.temperature: NDArray[np.float32] = np.zeros(max_slots, dtype=np.float32)
        self.seed: NDArray[np.uint64] = np.zeros(max_slots, dtype=np.uint64)
        self._unscored: set[int] = set()  # slots whose prompt logprobs were requested and aren't complete
        self.adapter_slots = {"": -1}  # by adapter key; "": no adapter
        self.adapter_slot: Int64s = np.full(max_slots, -1, dtype=np.int64)
        self._rejected: list[tuple[int, int]] = []  # slots whose adapter is missing, and their generations

    def begin_step(self, message: StepMessage) -> StepBatch:
        """Apply the changes of a message, lay out the step's tokens, and count them as computed."""
        self._apply_changes(message)
        wanted = self.live.astype(np.int64)
        if message.chunks:
            chunks = int32s(message.chunks, 2)
            wanted[chunks[:, 0]] = chunks[:, 1]
        slots = np.flatnonzero(wanted)
        counts, num_computed = wanted[slots], self.num_computed_tokens[slots].copy()
        drafts = self._propose_drafts(slots, counts) if self._max_draft_tokens else np.zeros_like(counts)
        num_tokens = self.num_tokens[slots]
        counts += drafts
        ends = num_computed + counts
        capacity = self.num_blocks[:, slots].min(0, initial=_NO_LIMIT) * self.block_size
        wrong = ~self.live[slots] | (ends - drafts > num_tokens) | (ends > capacity)
        if wrong.any():
            slot = int(slots[np.flatnonzero(wrong)[0]])
            raise RuntimeError(
                f"step {message.step}: slot {slot} (live: {bool(self.live[slot])}) can't compute {wanted[slot]} tokens "
                f"after {self.num_computed_tokens[slot]} of {self.num_tokens[slot]} in "
                f"{self.num_blocks[:, slot].min(initial=_NO_LIMIT)} blocks"
            )
        starts = np.cumsum(counts) - counts
        row_of = np.repeat(np.arange(len(slots)), counts)
        positions = np.arange(len(row_of)) - starts[row_of] + num_computed[row_of]
        ids = self.tokens[slots[row_of], positions].astype(np.int64)
        samples = ends - drafts == num_tokens
        self.num_computed_tokens[slots] = ends
        num_used_blocks = int(-(-ends.max() // self.block_size)) if len(slots) else 0
        tables = self.block_tables[:, slots, :num_used_blocks]
        last, own_drafts = (starts + counts - 1)[samples], drafts[samples]
        sampled_at = np.repeat(last - own_drafts, own_drafts + 1) + _ranges(own_drafts + 1)
        adapter_slots = self.adapter_slot[slots] if len(self.adapter_slots) > 1 else None
        scored_at = self._find_scored(slots, starts, num_computed, ends) if self._unscored else _NONE
        return StepBatch(
            message.step, slots, starts, counts, num_computed, tables, row_of, ids, positions, adapter_slots,
            slots[samples], own_drafts, sampled_at, scored_at,
        )  # fmt: skip

    def append_tokens(self, slots: Int64s, tokens: NDArray[np.integer]) -> None:
        """Append one sampled token to each of `slots`."""
        self.tokens[slots, self.num_tokens[slots]] = tokens
        self.num_tokens[slots] += 1

    def append_accepted(self, batch: StepBatch, tokens: Int64s) -> tuple[Int64s, Int64s]:
        """Append the tokens sampled at `batch.sampled_at`, as far as the draft tokens before them are accepted.

        Returns the tokens that count, and how many each sampling slot got. The KV of a rejected draft token is
        overwritten by the next step.

        Example: a slot with the draft tokens [7, 8, 9], for which [7, 8, 4, 6] was sampled: 7 and 8 are accepted, 4
        replaces 9, and 6 is dropped since it follows the rejected 9.
        """
        kept, counts, begin = [], np.empty_like(batch.sampling), 0
        pairs = zip(batch.sampling.tolist(), batch.num_draft_tokens.tolist(), strict=True)
        for i, (slot, num_drafts) in enumerate(pairs):
            sampled = tokens[begin : begin + num_drafts + 1]
            begin += num_drafts + 1
            known = int(self.num_tokens[slot])
            wrong = np.flatnonzero(self.tokens[slot, known : known + num_drafts] != sampled[:num_drafts])
            count = int(wrong[0]) + 1 if len(wrong) else num_drafts + 1
            self.tokens[slot, known : known + count] = sampled[:count]
            self.num_tokens[slot] = known + count
            self.num_computed_tokens[slot] = known + count - 1
            kept.append(sampled[:count])
            counts[i] = count
        return np.concatenate(kept), counts

    def _find_scored(self, slots: Int64s, starts: Int64s, num_computed: Int64s, ends: Int64s) -> Int64s:
        """`StepBatch.scored_at`; slots whose prompt ends in this step are complete."""
        found = [_NONE]
        for i in np.flatnonzero(np.isin(slots, list(self._unscored))).tolist():
            last = int(self.num_prompt_tokens[slots[i]]) - 1  # the token after it isn't one of the prompt
            count = min(int(ends[i]), last) - int(num_computed[i])
            found.append(np.arange(starts[i], starts[i] + count))
            if ends[i] >= last:
                self._unscored.discard(int(slots[i]))
        return np.concatenate(found)

    def _propose_drafts(self, slots: Int64s, counts: Int64s) -> Int64s:
        """Write draft tokens behind the tokens of slots that decode greedily; returns how many each slot got."""
        drafts = np.zeros_like(counts)
        decoding = (counts == 1) & (self.num_computed_tokens[slots] + 1 == self.num_tokens[slots])
        most = drafts_per_request(self._max_draft_tokens, int(decoding.sum()))
        for i in np.flatnonzero(decoding & self.is_plain_greedy[slots]).tolist() if most else ():
            slot = int(slots[i])
            known = int(self.num_tokens[slot])
            capacity = min(int(self.num_blocks[:, slot].min()) * self.block_size, self.tokens.shape[1] - 1)
            count = min(most, capacity - known)
            proposed = propose(self.tokens[slot, :known], count) if count > 0 else self.tokens[slot, :0]
            self.tokens[slot, known : known + len(proposed)] = proposed
            drafts[i] = len(proposed)
        return drafts

    def take_reports(self) -> StepReports | None:
        """What the result of the step that began last has to report."""
        if not self._rejected:
            return None
        rejected, self._rejected = self._rejected, []
        return StepReports(column(rejected))

    def put_features(self, features: Features) -> None:
        """Keep the features of an input until it is encoded; slots without an encoder have no use for them."""

    def output_tokens(self, slot: int) -> Int32s:
        """The slot's tokens without its prompt; a view."""
        return self.tokens[slot, self.num_prompt_tokens[slot] : self.num_tokens[slot]]

    def known_tokens(self, slot: int) -> Int32s:
        """The slot's prompt and output tokens; a view."""
        return self.tokens[slot, : self.num_tokens[slot]]

    def _apply_changes(self, message: StepMessage) -> None:
        if message.freed_slots:
            freed = int32s(message.freed_slots)
            self.live[freed] = False
            self._unscored.difference_update(freed.tolist())
        for assignment in message.assigned_slots:
            self._assign(assignment)
        for slot, group, block in message.unpack_new_blocks().tolist():
            if group >= len(self.block_tables):
                raise RuntimeError(f"step {message.step}: KV group {group} of slot {slot} doesn't exist")
            self.block_tables[group, slot, self.num_blocks[group, slot]] = block
            self.num_blocks[group, slot] += 1

    def _assign(self, assignment: SlotAssignment) -> None:
        slot, tokens, sampling = assignment.slot, int32s(assignment.tokens), assignment.sampling
        if self.live[slot] or assignment.generation <= self.generation[slot]:
            raise RuntimeError(
                f"slot {slot} can't take generation {assignment.generation}: it is at {self.generation[slot]}, "
                f"{'live' if self.live[slot] else 'free'}"
            )
        adapter_slot = self.adapter_slots.get(assignment.adapter)
        if adapter_slot is None:
            # Computed without the adapter until the core ends it, so that the batch stays as the core scheduled it.
            self._rejected.append((slot, assignment.generation))
            adapter_slot = -1
        self.adapter_slot[slot] = adapter_slot
        self.live[slot] = True
        self.generation[slot] = assignment.generation
        self.tokens[slot, : len(tokens)] = tokens
        self.num_tokens[slot] = len(tokens)
        self.num_prompt_tokens[slot] = assignment.num_prompt_tokens
        self.num_computed_tokens[slot] = assignment.num_computed_tokens
        for group, table in enumerate(assignment.block_tables):
            blocks = int32s(table)
            self.block_tables[group, slot, : len(blocks)] = blocks
            self.num_blocks[group, slot] = len(blocks)
        self.sampling[slot] = sampling
        self.constrained[slot] = assignment.constrained
        self.is_plain_greedy[slot] = sampling.is_plain_greedy and not assignment.constrained
        self.needs_logits[slot] = sampling.needs_logits
        self.temperature[slot] = sampling.temperature
        self.seed[slot] = sampling.seed
        if sampling.prompt_logprobs >= 0 and assignment.num_computed_tokens + 1 < assignment.num_prompt_tokens:
            self._unscored.add(slot)


def _ranges(lengths: Int64s) -> Int64s:
    """0, 1, …, n - 1 for each n of `lengths`, end to end."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
