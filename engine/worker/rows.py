"""The rows of a worker: the state of every live request, kept here so that a step message carries only what changed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.messages import Int32s, RowAdded, Sampling, StepMessage, int32s
from engine.worker.drafts import propose, share

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's tokens, rows ascending and laid end to end.

    rows, starts, counts, computed: int64[rows]; tables: int32[KV groups, rows, blocks];
    row_of: int64[tokens] into `rows`; ids, positions: int64[tokens];
    adapters: int64[rows], each row's slot or -1 for none; None: no row has one.
    sampling: int64[n], the rows that sample; drafts: int64[n], how many of a row's tokens are guesses (see
    `engine.worker.drafts`); sampled_at: int64[n + sum of drafts], the tokens of the batch whose logits they use.
    scored_at: int64[m], the tokens of the batch before prompt tokens whose logprobs are asked for.
    """

    step: int
    rows: Int64s
    starts: Int64s
    counts: Int64s
    computed: Int64s
    tables: Int32s
    row_of: Int64s
    ids: Int64s
    positions: Int64s
    adapters: Int64s | None
    sampling: Int64s
    drafts: Int64s
    sampled_at: Int64s
    scored_at: Int64s

    @property
    def logits_at(self) -> Int64s:
        """The tokens of the batch whose logits are needed: `sampled_at`, then `scored_at`."""
        return np.concatenate((self.sampled_at, self.scored_at)) if len(self.scored_at) else self.sampled_at


_NONE: Int64s = np.zeros(0, dtype=np.int64)


class Rows:
    """Struct of arrays over rows; the scheduler alone numbers and reuses them.

    `draft_tokens`: most guesses a row; `groups`: KV groups, each with a block table for every row.
    """

    def __init__(self, max_rows: int, max_model_len: int, block_size: int, draft_tokens: int = 0, groups: int = 1):
        self._draft_tokens = draft_tokens
        max_blocks = -(-max_model_len // block_size) + 1
        self.block_size = block_size
        self.tokens: Int32s = np.zeros((max_rows, max_model_len + 1), dtype=np.int32)
        self.table: Int32s = np.zeros((groups, max_rows, max_blocks), dtype=np.int32)
        self.num_tokens: Int64s = np.zeros(max_rows, dtype=np.int64)
        self.prompt_len: Int64s = np.zeros(max_rows, dtype=np.int64)
        self.computed: Int64s = np.zeros(max_rows, dtype=np.int64)
        self.num_blocks: Int64s = np.zeros((groups, max_rows), dtype=np.int64)
        self.generation: Int64s = np.full(max_rows, -1, dtype=np.int64)
        self.live: NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)
        self.sampling: list[Sampling] = [Sampling()] * max_rows
        self.plain: NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)  # takes the likeliest token, no more asked
        self.special: NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)  # its logits are needed
        self.temperature: NDArray[np.float32] = np.zeros(max_rows, dtype=np.float32)
        self.seed: NDArray[np.uint64] = np.zeros(max_rows, dtype=np.uint64)
        self.scoring: set[int] = set()  # rows whose prompt's logprobs are asked for and still to come
        self.slots = {"": -1}  # of adapters, by key
        self.adapter: Int64s = np.full(max_rows, -1, dtype=np.int64)  # slots
        self._refused: list[tuple[int, int]] = []  # rows whose adapter isn't here, and their generations

    def advance(self, message: StepMessage) -> StepBatch:
        """Apply what changed, lay out the step's tokens, and count them as computed."""
        self._apply(message)
        wanted = self.live.astype(np.int64)
        if message.chunks:
            chunks = int32s(message.chunks, 2)
            wanted[chunks[:, 0]] = chunks[:, 1]
        rows = np.flatnonzero(wanted)
        counts, computed = wanted[rows], self.computed[rows].copy()
        drafts = self._draft(rows, counts) if self._draft_tokens else np.zeros_like(counts)
        known = self.num_tokens[rows]
        counts += drafts
        ends = computed + counts
        room = self.num_blocks[:, rows].min(0) * self.block_size
        wrong = ~self.live[rows] | (ends - drafts > known) | (ends > room)
        if wrong.any():
            row = int(rows[np.flatnonzero(wrong)[0]])
            raise RuntimeError(
                f"step {message.step}: row {row} (live: {bool(self.live[row])}) can't compute {wanted[row]} tokens "
                f"after {self.computed[row]} of {self.num_tokens[row]} in {self.num_blocks[:, row].min()} blocks"
            )
        starts = np.cumsum(counts) - counts
        row_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(row_of)) - starts[row_of] + computed[row_of]
        ids = self.tokens[rows[row_of], positions].astype(np.int64)
        samples = ends - drafts == known
        self.computed[rows] = ends
        used = int(-(-ends.max() // self.block_size)) if len(rows) else 0
        tables = self.table[:, rows, :used]
        last, guesses = (starts + counts - 1)[samples], drafts[samples]
        at = np.repeat(last - guesses, guesses + 1) + _counted(guesses + 1)
        adapters = self.adapter[rows] if len(self.slots) > 1 else None
        return StepBatch(
            message.step, rows, starts, counts, computed, tables, row_of, ids, positions, adapters,
            rows[samples], guesses, at, self._score(rows, starts, computed, ends) if self.scoring else _NONE,
        )  # fmt: skip

    def append(self, rows: Int64s, tokens: NDArray[np.integer]) -> None:
        """Book one sampled token for each of `rows`."""
        self.tokens[rows, self.num_tokens[rows]] = tokens
        self.num_tokens[rows] += 1

    def append_verified(self, batch: StepBatch, tokens: Int64s) -> tuple[Int64s, Int64s]:
        """Book what was sampled at each of `batch.sampled_at`, as far as the guesses before it were right.

        Returns the tokens that count, and how many each sampling row got. A wrong guess leaves a slot of the KV cache
        that the next step writes anew.
        """
        kept, counts, begin = [], np.empty_like(batch.sampling), 0
        for i, (row, guesses) in enumerate(zip(batch.sampling.tolist(), batch.drafts.tolist(), strict=True)):
            found = tokens[begin : begin + guesses + 1]
            begin += guesses + 1
            known = int(self.num_tokens[row])
            wrong = np.flatnonzero(self.tokens[row, known : known + guesses] != found[:guesses])
            count = int(wrong[0]) + 1 if len(wrong) else guesses + 1
            self.tokens[row, known : known + count] = found[:count]
            self.num_tokens[row] = known + count
            self.computed[row] = known + count - 1
            kept.append(found[:count])
            counts[i] = count
        return np.concatenate(kept), counts

    def _score(self, rows: Int64s, starts: Int64s, computed: Int64s, ends: Int64s) -> Int64s:
        """The tokens of the batch before prompt tokens to be scored; rows whose prompt ends here are done."""
        found = [_NONE]
        for i in np.flatnonzero(np.isin(rows, list(self.scoring))).tolist():
            last = int(self.prompt_len[rows[i]]) - 1  # what comes after it is no prompt token
            count = min(int(ends[i]), last) - int(computed[i])
            found.append(np.arange(starts[i], starts[i] + count))
            if ends[i] >= last:
                self.scoring.discard(int(rows[i]))
        return np.concatenate(found)

    def _draft(self, rows: Int64s, counts: Int64s) -> Int64s:
        """Write guesses behind the tokens of rows that decode and take the likeliest token; how many each row got."""
        drafts = np.zeros_like(counts)
        decoding = (counts == 1) & (self.computed[rows] + 1 == self.num_tokens[rows])
        most = share(self._draft_tokens, int(decoding.sum()))
        for i in np.flatnonzero(decoding & self.plain[rows]).tolist() if most else ():
            row = int(rows[i])
            known = int(self.num_tokens[row])
            room = min(int(self.num_blocks[:, row].min()) * self.block_size, self.tokens.shape[1] - 1) - known
            guesses = propose(self.tokens[row, :known], min(most, room)) if room > 0 else self.tokens[row, :0]
            self.tokens[row, known : known + len(guesses)] = guesses
            drafts[i] = len(guesses)
        return drafts

    def take_refused(self) -> list[tuple[int, int]]:
        """Rows added since the last call that can't be served, and their generations: the core is to end them."""
        refused, self._refused = self._refused, []
        return refused

    def output(self, row: int) -> Int32s:
        """The row's tokens so far without its prompt; a view."""
        return self.tokens[row, self.prompt_len[row] : self.num_tokens[row]]

    def known(self, row: int) -> Int32s:
        """The row's tokens so far; a view."""
        return self.tokens[row, : self.num_tokens[row]]

    def _apply(self, message: StepMessage) -> None:
        if message.removed:
            removed = int32s(message.removed)
            self.live[removed] = False
            self.scoring.difference_update(removed.tolist())
        for added in message.added:
            self._add(added)
        for row, group, block in message.appended().tolist():
            if group >= len(self.table):
                raise RuntimeError(f"step {message.step}: KV group {group} of row {row} doesn't exist")
            self.table[group, row, self.num_blocks[group, row]] = block
            self.num_blocks[group, row] += 1

    def _add(self, added: RowAdded) -> None:
        row, tokens = added.row, int32s(added.tokens)
        if self.live[row] or added.generation <= self.generation[row]:
            raise RuntimeError(
                f"row {row} can't take generation {added.generation}: it is at {self.generation[row]}, "
                f"{'live' if self.live[row] else 'free'}"
            )
        slot = self.slots.get(added.adapter)
        if slot is None:  # computed without it, so that the batch stays as the core planned it, until the core ends it
            self._refused.append((row, added.generation))
            slot = -1
        self.adapter[row] = slot
        self.live[row] = True
        self.generation[row] = added.generation
        self.tokens[row, : len(tokens)] = tokens
        self.num_tokens[row] = len(tokens)
        self.prompt_len[row] = added.prompt_len
        self.computed[row] = added.computed
        for group, column in enumerate(added.blocks):
            blocks = int32s(column)
            self.table[group, row, : len(blocks)] = blocks
            self.num_blocks[group, row] = len(blocks)
        self.sampling[row] = added.sampling
        self.plain[row] = added.sampling.plain
        self.special[row] = added.sampling.special
        self.temperature[row] = added.sampling.temperature
        self.seed[row] = added.sampling.seed
        if added.sampling.prompt_logprobs >= 0 and added.computed + 1 < added.prompt_len:
            self.scoring.add(row)


def _counted(lengths: Int64s) -> Int64s:
    """0, 1, … for each of `lengths`, one after the other."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
