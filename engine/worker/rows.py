"""The rows of a worker: the state of every live request, kept here so that a step message carries only what changed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.messages import Int32s, RowAdded, Sampling, StepMessage, int32s

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step's tokens, rows ascending and laid end to end.

    rows, starts, counts, computed: int64[rows]; row_of: int64[tokens] into `rows`; ids, positions: int64[tokens];
    sampling: int64[n], the rows that sample; sampled_at: int64[n], the token of the batch whose logits they use.
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
    sampling: Int64s
    sampled_at: Int64s


class Rows:
    """Struct of arrays over rows; the scheduler alone numbers and reuses them."""

    def __init__(self, max_rows: int, max_model_len: int, block_size: int):
        max_blocks = -(-max_model_len // block_size) + 1
        self.block_size = block_size
        self.tokens: Int32s = np.zeros((max_rows, max_model_len + 1), dtype=np.int32)
        self.table: Int32s = np.zeros((max_rows, max_blocks), dtype=np.int32)
        self.num_tokens: Int64s = np.zeros(max_rows, dtype=np.int64)
        self.prompt_len: Int64s = np.zeros(max_rows, dtype=np.int64)
        self.computed: Int64s = np.zeros(max_rows, dtype=np.int64)
        self.num_blocks: Int64s = np.zeros(max_rows, dtype=np.int64)
        self.generation: Int64s = np.full(max_rows, -1, dtype=np.int64)
        self.live: NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)
        self.sampling: list[Sampling] = [Sampling()] * max_rows
        self.plain: NDArray[np.bool_] = np.zeros(max_rows, dtype=np.bool_)  # takes the likeliest token, no more asked

    def advance(self, message: StepMessage) -> StepBatch:
        """Apply what changed, lay out the step's tokens, and count them as computed."""
        self._apply(message)
        wanted = self.live.astype(np.int64)
        if message.chunks:
            chunks = int32s(message.chunks, 2)
            wanted[chunks[:, 0]] = chunks[:, 1]
        rows = np.flatnonzero(wanted)
        counts, computed = wanted[rows], self.computed[rows].copy()
        ends = computed + counts
        wrong = ~self.live[rows] | (ends > self.num_tokens[rows]) | (ends > self.num_blocks[rows] * self.block_size)
        if wrong.any():
            row = int(rows[np.flatnonzero(wrong)[0]])
            raise RuntimeError(
                f"step {message.step}: row {row} (live: {bool(self.live[row])}) can't compute {wanted[row]} tokens "
                f"after {self.computed[row]} of {self.num_tokens[row]} in {self.num_blocks[row]} blocks"
            )
        starts = np.cumsum(counts) - counts
        row_of = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(row_of)) - starts[row_of] + computed[row_of]
        ids = self.tokens[rows[row_of], positions].astype(np.int64)
        samples = ends == self.num_tokens[rows]
        self.computed[rows] = ends
        used = int(-(-ends.max() // self.block_size)) if len(rows) else 0
        tables = self.table[rows, :used]
        at = (starts + counts - 1)[samples]
        return StepBatch(
            message.step, rows, starts, counts, computed, tables, row_of, ids, positions, rows[samples], at
        )

    def append(self, rows: Int64s, tokens: NDArray[np.integer]) -> None:
        """Book one sampled token for each of `rows`."""
        self.tokens[rows, self.num_tokens[rows]] = tokens
        self.num_tokens[rows] += 1

    def output(self, row: int) -> Int32s:
        """The row's tokens so far without its prompt; a view."""
        return self.tokens[row, self.prompt_len[row] : self.num_tokens[row]]

    def known(self, row: int) -> Int32s:
        """The row's tokens so far; a view."""
        return self.tokens[row, : self.num_tokens[row]]

    def _apply(self, message: StepMessage) -> None:
        if message.removed:
            self.live[int32s(message.removed)] = False
        for added in message.added:
            self._add(added)
        if message.blocks:
            for row, group, block in int32s(message.blocks, 3).tolist():
                if group != 0:
                    raise RuntimeError(f"step {message.step}: KV group {group} of row {row} doesn't exist")
                self.table[row, self.num_blocks[row]] = block
                self.num_blocks[row] += 1

    def _add(self, added: RowAdded) -> None:
        row, tokens, blocks = added.row, int32s(added.tokens), int32s(added.blocks)
        if self.live[row] or added.generation <= self.generation[row]:
            raise RuntimeError(
                f"row {row} can't take generation {added.generation}: it is at {self.generation[row]}, "
                f"{'live' if self.live[row] else 'free'}"
            )
        self.live[row] = True
        self.generation[row] = added.generation
        self.tokens[row, : len(tokens)] = tokens
        self.num_tokens[row] = len(tokens)
        self.prompt_len[row] = added.prompt_len
        self.computed[row] = added.computed
        self.table[row, : len(blocks)] = blocks
        self.num_blocks[row] = len(blocks)
        self.sampling[row] = added.sampling
        self.plain[row] = is_plain(added.sampling)


def is_plain(sampling: Sampling) -> bool:
    """Whether the likeliest token is all that is asked for: the logits themselves aren't needed."""
    barred = sampling.min_tokens > 0 and sampling.stop_ids
    penalties = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    return not (sampling.temperature or sampling.logprobs >= 0 or barred or penalties or sampling.logit_bias)
