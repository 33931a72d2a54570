"""Puts multimodal inputs into a prompt: each placeholder token becomes the tokens of its input.

    text  "<image>\\nWhat?"  ── with_surroundings ──►  text with what a family writes around placeholders
                                   tokenizer      ──►  ids, one placeholder each
                                   expand         ──►  ids with Processed.tokens, and the offset of each input

Inputs of a kind take the placeholders of that kind in order.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from engine.errors import RequestError

NAMES = {"image": ("image", "images"), "audio": ("sound", "sounds"), "video": ("video", "videos")}


class Replacement(Protocol):
    """What replaces a placeholder; see `engine.multimodal.types.Processed`."""

    @property
    def kind(self) -> str: ...

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def before(self) -> str: ...

    @property
    def after(self) -> str: ...


class HasKind(Protocol):
    @property
    def kind(self) -> str: ...


One = TypeVar("One", bound=Replacement)


def with_surroundings(text: str, inputs: Sequence[Replacement], placeholders: Mapping[str, str]) -> str:
    """The text of a prompt with `before` and `after` of each input around its placeholder.

    Args:
        text: with placeholders as text.
        inputs: in order, of each kind.
        placeholders: by kind, the text of the placeholder token.

    Raises:
        RequestError: the number of placeholders differs from that of inputs.
    """
    kinds = {written: kind for kind, written in placeholders.items()}
    pattern = re.compile("|".join(map(re.escape, sorted(kinds, key=len, reverse=True))))
    found = Counter(kinds[match[0]] for match in pattern.finditer(text))
    check_counts(found, inputs, placeholders)
    if not any(one.before or one.after for one in inputs):
        return text
    waiting = _by_kind(inputs)

    def surround(match: re.Match[str]) -> str:
        one = next(waiting[kinds[match[0]]])
        return f"{one.before}{match[0]}{one.after}"

    return pattern.sub(surround, text)


def expand(
    ids: Sequence[int],
    inputs: Sequence[One],
    placeholders: Mapping[str, int],
    *,
    texts: Mapping[str, str] | None = None,
    encode: Callable[[str], Sequence[int]] | None = None,
) -> tuple[list[int], list[tuple[int, One]]]:
    """Replace the placeholders of a prompt.

    Args:
        ids: of the prompt.
        inputs: in order, of each kind.
        placeholders: by kind, the id of the placeholder token.
        texts: by kind, the text of the placeholder token, for messages.
        encode: tokenizes the text that a family writes around a placeholder, in a prompt that was given as ids; None:
            that text is in the prompt already.

    Returns:
        The ids of the prompt, and the offset of each input, ascending.

    Raises:
        RequestError: the number of placeholders differs from that of inputs.
    """
    kinds = {token: kind for kind, token in placeholders.items()}
    positions = np.flatnonzero(np.isin(np.asarray(ids, dtype=np.int64), list(kinds))).tolist()
    check_counts(Counter(kinds[ids[at]] for at in positions), inputs, texts or {})
    waiting = _by_kind(inputs)
    expanded: list[int] = []
    placed: list[tuple[int, One]] = []
    begin = 0
    for at in positions:
        one = next(waiting[kinds[ids[at]]])
        expanded += ids[begin:at]
        if encode is not None and one.before:
            expanded += encode(one.before)
        placed.append((len(expanded), one))
        expanded += one.tokens
        if encode is not None and one.after:
            expanded += encode(one.after)
        begin = at + 1
    expanded += ids[begin:]
    return expanded, placed


def check_counts(found: Mapping[str, int], inputs: Sequence[HasKind], texts: Mapping[str, str]) -> None:
    """Raise RequestError unless a prompt has one placeholder for each input.

    Args:
        found: the number of placeholders by kind.
        inputs: of the prompt.
        texts: by kind, the text of the placeholder token.
    """
    given = Counter(one.kind for one in inputs)
    for kind in {**found, **given}:
        if found.get(kind, 0) != given[kind]:
            shown = f"{found.get(kind, 0)} placeholders" + (f" ({texts[kind]})" if kind in texts else "")
            raise RequestError(f"the prompt has {shown} for {count_of(given[kind], kind)}: there must be one for each")


def count_of(number: int, kind: str) -> str:
    """A number of inputs in words: 1 image, 2 sounds."""
    one, several = NAMES[kind]
    return f"{number} {one if number == 1 else several}"


def _by_kind(inputs: Sequence[One]) -> dict[str, Iterator[One]]:
    kinds = dict.fromkeys(one.kind for one in inputs)
    return {kind: iter([one for one in inputs if one.kind == kind]) for kind in kinds}
