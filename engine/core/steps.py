"""What the scheduler returns: a scheduled step, and the outcome of its result."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.logprob_columns import PromptLogprobs
from engine.messages import Finished, StepMessage
from engine.pooling import Pooled


@dataclass(slots=True)
class ScheduledStep:
    """A scheduled step, or a burst of `num_steps` steps in one message."""

    step: int  # number of the first one
    message: StepMessage
    slots: NDArray[np.intp]  # those that sample, ascending
    generations: NDArray[np.int32]
    num_tokens: int  # of each step
    num_steps: int = 1


@dataclass(slots=True)
class StepOutcome:
    """A booked result: tokens by request, in the result's order, and the requests that ended."""

    handles: NDArray[np.int64]
    tokens: NDArray[np.int32]
    kept: NDArray[np.bool_]  # over the result's tokens
    finished: list[Finished]
    counts: NDArray[np.int32] | None  # tokens of each handle; None: one
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    pooled: tuple[Pooled, ...] = ()
