"""Pairs of texts as one prompt, for models that score how well the second one suits the first."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import RequestError
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.truncation import encode_end, truncate

Pairs = list[tuple[str, str]]


def make_pairs(first: str | Sequence[str], second: str | Sequence[str], fields: tuple[str, str]) -> Pairs:
    """The first text with each second one, or as many on both sides.

    Raises RequestError, with one of the `fields` that have the texts.
    """
    firsts, seconds = ([one] if isinstance(one, str) else list(one) for one in (first, second))
    for name, texts in zip(fields, (firsts, seconds), strict=True):
        if not texts:
            raise RequestError(f"{name} is an empty list", name)
    if len(firsts) == 1:
        firsts *= len(seconds)
    if len(firsts) != len(seconds):
        one, other = fields
        raise RequestError(
            f"{one} has {len(firsts)} texts and {other} {len(seconds)}: give one {one}, or as many of both", other
        )
    return list(zip(firsts, seconds, strict=True))


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


class PairLimits(NamedTuple):
    """How many tokens of a pair are kept: of the whole prompt, of its first text and of its second; None: all."""

    prompt: int | None = None
    first: int | None = None
    second: int | None = None


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


def encode_pairs(tokenizer: Tokenizer, pairs: Pairs, limits: PairLimits) -> list[TextPair]:
    """The prompts of pairs. Raises RequestError if nothing of a second text is left."""
    frame = pair_frame(tokenizer)
    return [encode_pair(tokenizer, frame, first, second, limits) for first, second in pairs]


def encode_pair(tokenizer: Tokenizer, frame: PairFrame, first: str, second: str, limits: PairLimits) -> TextPair:
    """A pair as a prompt; the ends of its texts are cut off. Raises RequestError if none of the second is left."""
    ids = _beginning(tokenizer, first, limits.first)
    room = limits.second
    if limits.prompt is not None:
        left = limits.prompt - len(ids) - len(frame.before) - len(frame.middle) - len(frame.behind)
        if left < 1:
            raise RequestError(
                f"the first text has {len(ids)} tokens, so that nothing of the second one is left in {limits.prompt}: "
                "shorten it, or raise truncate_prompt_tokens",
                "truncate_prompt_tokens",
            )
        room = left if room is None else min(room, left)
    others = _beginning(tokenizer, second, room)
    begin = len(frame.before) + len(ids)
    segment = begin + frame.first_segment if frame.has_segments else 0
    return TextPair([*frame.before, *ids, *frame.middle, *others, *frame.behind], segment)


def _beginning(tokenizer: Tokenizer, text: str, most: int | None) -> list[int]:
    """The first `most` tokens of a text, without special tokens."""
    if most is None:
        return tokenizer.encode(text, add_special_tokens=False)
    return truncate(encode_end(tokenizer, text, most, "right", False)[0], most, "right", ())
