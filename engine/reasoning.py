"""How a model marks its reasoning, and the limit of a request's reasoning, as they cross process boundaries."""

import msgspec


class ReasoningMarks(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The texts around the reasoning of a model."""

    begin: str  # a regular expression; reasoning begins after it
    ends: tuple[str, ...]  # reasoning ends before any of them; the first one is written where a budget is used up
    # Whether there may be several parts with reasoning. Otherwise it begins at the start of the output or not at all.
    repeats: bool = False


class ReasoningBudget(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The limit of one output."""

    marks: ReasoningMarks
    tokens: int  # of reasoning, at most
    is_open: bool  # the prompt has begun the reasoning
