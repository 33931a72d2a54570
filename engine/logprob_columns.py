"""Logprobs as they cross process boundaries: columns of numbers."""

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.columns import float32s, int32s


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Logprobs of tokens: column 0 is the sampled token, the others are the top k in order.

    index: int32[m], positions in `Outputs.tokens` (or in `StepResult.tokens`) · ids: int32[m, width] ·
    values: float32[m, width] · ranks: int32[m], of the sampled token; 1 is the greedy token. Columns beyond the k of a
    request have no meaning.
    """

    width: int
    index: bytes
    ids: bytes
    values: bytes
    ranks: bytes


def select_logprobs(logprobs: TokenLogprobs, kept: NDArray[np.bool_]) -> TokenLogprobs | None:
    """The entries of the kept tokens, with their index among these."""
    index = int32s(logprobs.index)
    entries = kept[index]
    if not entries.any():
        return None
    renumbered = (np.cumsum(kept) - 1).astype(np.int32)
    return TokenLogprobs(
        width=logprobs.width,
        index=renumbered[index[entries]].tobytes(),
        ids=int32s(logprobs.ids).reshape(-1, logprobs.width)[entries].tobytes(),
        values=float32s(logprobs.values).reshape(-1, logprobs.width)[entries].tobytes(),
        ranks=int32s(logprobs.ranks)[entries].tobytes(),
    )


class PromptLogprobs(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Logprobs of the prompt tokens that one step scored; `index` of `logprobs` are positions in the prompt.

    Column 0 is the prompt's own token. Position 0 has no logprobs, since nothing precedes it. After a preemption the
    prompt is computed again, so positions may appear twice; the first ones count.
    """

    owner: int  # StepResult: the slot; Outputs: the handle
    generation: int  # of the slot
    logprobs: TokenLogprobs
