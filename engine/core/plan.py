"""What the scheduler hands to the core: steps under way, and what their results meant."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.messages import Finished, PromptLogprobs, StepMessage


@dataclass(slots=True)
class Plan:
    """A step under way, or a burst of them: what was sent, and which rows its results speak of."""

    step: int
    message: StepMessage
    rows: NDArray[np.intp]  # rows that sample, ascending
    generations: NDArray[np.int32]
    num_tokens: int  # of each step
    steps: int = 1


@dataclass(slots=True)
class Booked:
    """What a result meant: the rows whose tokens count, in the result's order, and who is done."""

    handles: NDArray[np.int64]
    tokens: NDArray[np.int32]
    kept: NDArray[np.bool_]  # over the result's tokens
    finished: list[Finished]
    counts: NDArray[np.int32] | None  # tokens of each handle; None: one
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
