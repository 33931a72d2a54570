"""Pairs of texts as one prompt, for models that score how well the second one suits the first."""

from typing import NamedTuple

from engine.errors import RequestError
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.truncation import encode_end, truncate


class PairFrame(NamedTuple):
    """The special tokens of a pair, and how many of those in the middle belong to the first segment."""

    before: list[int]
    middle: list[int]
    behind: list[int]
    first_segment: int
    has_segments: bool  # the second text has tokens of type 1


class TextPair(NamedTuple):
    """A pair as a prompt; see `AddRequest.second_segment`."""

    ids: list[int]
    second_segment: int


def pair_frame(tokenizer: Tokenizer) -> PairFrame:
    """The frame that the tokenizer puts around each pair; without special tokens if it can't be recognized."""
    bare, (ids, types) = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode_pair("a", "a")
    count = len(bare)
    at = [start for start in range(len(ids) - count + 1) if ids[start : start + count] == bare]
    if len(at) < 2 or at[-1] < at[0] + count:
        return PairFrame([], [], [], 0, False)
    middle = slice(at[0] + count, at[-1])
    first_segment = types[middle].count(0)
    return PairFrame(ids[: at[0]], ids[middle], ids[at[-1] + count :], first_segment, types[at[-1]] == 1)


def encode_pair(tokenizer: Tokenizer, frame: PairFrame, first: str, second: str, keep: int | None) -> TextPair:
    """A pair as a prompt of at most `keep` tokens, None for all: the end of the second text is cut off.

    Raises RequestError if nothing of the second text is left.
    """
    ids = tokenizer.encode(first, add_special_tokens=False)
    if keep is None:
        others = tokenizer.encode(second, add_special_tokens=False)
    else:
        room = keep - len(ids) - len(frame.before) - len(frame.middle) - len(frame.behind)
        if room < 1:
            raise RequestError(
                f"the first text has {len(ids)} tokens, so that nothing of the second one is left in {keep}: shorten "
                "it, or raise truncate_prompt_tokens",
                "truncate_prompt_tokens",
            )
        others = truncate(encode_end(tokenizer, second, room, "right", False)[0], room, "right", ())
    begin = len(frame.before) + len(ids)
    segment = begin + frame.first_segment if frame.has_segments else 0
    return TextPair([*frame.before, *ids, *frame.middle, *others, *frame.behind], segment)
