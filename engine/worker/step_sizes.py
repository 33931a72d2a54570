"""The sizes to which steps are padded, so that a captured step serves all steps that fit. numpy only.

Steps in which every row has one token have sizes of their own: they are most of the steps, small, and leave out the
attention of long rows. Example with 6 requests and 40 tokens a step:

    decode   1, 2, 4, 6 tokens
    mixed    16, 32, 40 tokens

A size has as many batch rows as tokens, but at most one for each request. Each row may sample a token.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.worker.slots import StepBatch

LARGEST_FINE_SIZE = 256  # tokens; up to here decode sizes are multiples of 8, and mixed ones powers of two
FINE_STEP = 8
SMALLEST_MIXED_SIZE = 16
STEPS_PER_OCTAVE = 4  # beyond LARGEST_FINE_SIZE: of the interval from a power of two to the next


@dataclass(frozen=True, slots=True)
class Padding:
    """To what an array is padded. columns: of a two-dimensional one. fill: the added entries."""

    entries: int
    fill: int = 0
    columns: int = 0

    def pad(self, name: str, array: NDArray[Any] | None) -> NDArray[Any]:
        """A copy of an array, int32 if it is None. Raises ValueError if it is too long."""
        shape = (self.entries, self.columns) if self.columns else (self.entries,)
        padded = np.full(shape, self.fill, dtype=np.int32 if array is None else array.dtype)
        if array is not None:
            if len(array) > self.entries:
                raise ValueError(f"{name} has {len(array)} entries, more than {self.entries}")
            padded[: len(array)] = array
        return padded


@dataclass(frozen=True, slots=True)
class StepSize:
    """A padded step. rows: of the batch, and sampled tokens. mixed: rows may have several tokens."""

    tokens: int
    rows: int
    mixed: bool


class StepSizes:
    """All sizes of an engine.

    Args:
        max_num_seqs: most rows.
        max_tokens: of a step.
    """

    def __init__(self, max_num_seqs: int, max_tokens: int):
        self._tokens = {False: _decode_tokens(max_num_seqs), True: _mixed_tokens(max_tokens)}  # by whether it is mixed
        self._sizes = {
            mixed: [StepSize(one, min(one, max_num_seqs), mixed) for one in tokens]
            for mixed, tokens in self._tokens.items()
        }

    @property
    def in_capture_order(self) -> list[StepSize]:
        """All sizes: the largest, in whose memory the others fit; then those of decode steps, which are most steps."""
        sizes = [*self._sizes[False], *self._sizes[True]]
        largest = max(sizes, key=lambda size: (size.tokens, size.mixed))
        return sorted(sizes, key=lambda size: (size == largest, not size.mixed, size.tokens), reverse=True)

    def find(self, batch: StepBatch) -> StepSize | None:
        """The size to which a step is padded; None: it can't be one of these.

        Draft tokens are sampled at several tokens of a row, and prompt logprobs need logits of tokens of the prompt.
        """
        if len(batch.sampled_at) > len(batch.sampling) or len(batch.scored_at):
            return None
        tokens, mixed = len(batch.ids), len(batch.ids) > len(batch.slots)
        at = bisect_left(self._tokens[mixed], tokens)
        return self._sizes[mixed][at] if at < len(self._sizes[mixed]) else None


def _decode_tokens(most: int) -> list[int]:
    fine = [1, 2, 4, *range(FINE_STEP, LARGEST_FINE_SIZE + 1, FINE_STEP)]
    return [*(tokens for tokens in fine + _octaves(most) if tokens < most), most]


def _mixed_tokens(most: int) -> list[int]:
    sizes, tokens = [], SMALLEST_MIXED_SIZE
    while tokens <= LARGEST_FINE_SIZE:
        sizes.append(tokens)
        tokens *= 2
    return [*(tokens for tokens in sizes + _octaves(most) if tokens < most), most]


def _octaves(most: int) -> list[int]:
    """Numbers above LARGEST_FINE_SIZE and below `most`."""
    sizes, octave = [], LARGEST_FINE_SIZE
    while octave < most:
        sizes += [octave + octave * i // STEPS_PER_OCTAVE for i in range(1, STEPS_PER_OCTAVE + 1)]
        octave *= 2
    return sizes


def pad_arrays(arrays: Mapping[str, NDArray[Any]], layout: Mapping[str, Padding]) -> dict[str, NDArray[Any]] | None:
    """The arrays of `layout`, in its order; None: there are others, so the step is not one of those that are padded."""
    if not arrays.keys() <= layout.keys():
        return None
    return {name: padding.pad(name, arrays.get(name)) for name, padding in layout.items()}
