"""Texts for parsers of answers: put together of what models write, right or wrong, and divided anywhere."""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from engine.frontend.parsing.call_parser import CallFormat, CallParser
from engine.frontend.parsing.events import AnswerParser, Arguments, CallBegin, CallEnd, ParsedAnswer, parse_answer

Parsed = tuple[str, str, list[tuple[str, str]]]  # content, reasoning, names and arguments of calls

WORDS = (
    "Hello", " ", "\n", "\n\n", "{", "}", "[", "]", '"', "'", "\\", ",", ";", ":", "<", ">", "=", "(", ")", "é", "日本",
    "😀", "1", "-0.5", "null", "true", "f", "name", "#",
)  # fmt: skip
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3)


def texts_of(*pieces: str | st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Texts put together of these pieces, words, and beginnings of both."""
    given = [st.just(one) if isinstance(one, str) else one for one in pieces]
    piece = st.one_of(st.sampled_from(WORDS), *given)
    beginning = st.tuples(piece, st.integers(0, 12)).map(lambda pair: pair[0][: pair[1]])
    return st.lists(st.one_of(piece, piece, piece, beginning), max_size=10).map("".join)


@st.composite
def divided(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> list[str]:
    """A text in parts."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    places = range(len(text) + 1) if draw(st.booleans()) else [0, *cuts, len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(places)]


def parsed(answer: ParsedAnswer) -> Parsed:
    return answer.content, answer.reasoning, [(one.name, one.arguments) for one in answer.calls]


def parse_parts(parser: AnswerParser, parts: Sequence[str]) -> ParsedAnswer:
    """The answer whose text arrives in parts; events must come in their order."""
    answer = ParsedAnswer()
    events = [event for part in parts for event in parser.feed(part)] + parser.finish()
    in_call = False
    for event in events:
        assert in_call == isinstance(event, Arguments | CallEnd)
        in_call = isinstance(event, CallBegin) or (in_call and not isinstance(event, CallEnd))
    assert not in_call
    answer.add(events)
    return answer


def check(make: Callable[[], AnswerParser], parts: Sequence[str]) -> ParsedAnswer:
    """What the parts give is what the whole text gives, and all arguments are JSON objects."""
    answer = parse_parts(make(), parts)
    assert parsed(answer) == parsed(parse_answer(make(), "".join(parts)))
    for call in answer.calls:
        assert isinstance(json.loads(call.arguments), dict)
    assert len({call.id for call in answer.calls}) == len(answer.calls)
    return answer


def check_calls(make: Callable[[], CallFormat], parts: Sequence[str]) -> ParsedAnswer:
    """As `check`; without a call, the text is the content."""
    answer = check(lambda: CallParser(make()), parts)
    if not answer.calls:
        assert answer.content == "".join(parts)
    return answer


def calls_in(form: CallFormat, text: str) -> tuple[str, list[tuple[str, Any]]]:
    """Content, and calls with decoded arguments."""
    answer = parse_answer(CallParser(form), text)
    return answer.content, [(one.name, json.loads(one.arguments)) for one in answer.calls]
