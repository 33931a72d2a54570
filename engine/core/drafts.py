"""Rows whose steps may bring more than one token: workers guess some, and keep those that the model confirms.

How many came of a step is known only when its result is there, and by then the next one is planned. So `computed` and
`upper` of a row are bounds while steps are in flight for it: as if all guesses were right. They are made anew from what
is known whenever a step is planned or a result comes. A worker never guesses past the blocks it has been sent.
"""

import numpy as np
from numpy.typing import NDArray

from engine.core.rows import Rows
from engine.messages import StepResult, int32s


class Drafts:
    """The bounds of rows that sample, and what results mean for them."""

    def __init__(self, rows: Rows, most: int, block_size: int):
        self._rows = rows
        self._most = most
        self._block_size = block_size
        self.drafted = self.accepted = 0

    def planned(self, sampling: NDArray[np.intp]) -> None:
        """A step was planned that samples for these rows."""
        self._rows.pending[sampling] += 1
        self._bound(sampling)

    def _bound(self, at: NDArray[np.intp]) -> None:
        rows = self._rows
        reach = rows.known[at] - 1 + rows.pending[at] * (1 + self._most)
        rows.computed[at] = np.minimum(np.minimum(reach, rows.num_blocks[at] * self._block_size), rows.limit[at] - 1)
        rows.upper[at] = rows.computed[at] + 1

    def book(
        self, at: NDArray[np.intp], kept_rows: NDArray[np.bool_], result: StepResult
    ) -> tuple[NDArray[np.bool_], NDArray[np.int32], NDArray[np.bool_]]:
        """Book the tokens of the rows `at`, those of a step's sampling rows that are still the same request's.

        Returns which of the result's tokens count, how many each of `at` got, and which of them met a stop id.
        """
        tokens, rows = int32s(result.tokens), self._rows
        counts = int32s(result.counts) if result.counts else np.ones(len(kept_rows), np.int32)
        begins = (np.cumsum(counts) - counts)[kept_rows].tolist()
        kept = np.zeros(len(tokens), np.bool_)
        got, stopped = np.zeros(len(at), np.int32), np.zeros(len(at), np.bool_)
        for i, (row, begin, count) in enumerate(zip(at.tolist(), begins, counts[kept_rows].tolist(), strict=True)):
            count = min(count, int(rows.limit[row] - rows.known[row]))
            for token in tokens[begin : begin + count]:
                rows.tokens[row, rows.known[row]] = token
                rows.known[row] += 1
                got[i] += 1
                if rows.stopped(at[i : i + 1], token[None])[0]:
                    stopped[i] = True
                    break
            kept[begin : begin + int(got[i])] = True
        rows.pending[at] -= 1
        self._bound(at)
        self.drafted += result.drafted
        self.accepted += len(tokens) - len(kept_rows)
        return kept, got, stopped
