"""Calls whose output is constrained: arguments come as they are written."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.parsing.enforced_calls import EnforcedCall, EnforcedCalls
from engine.frontend.parsing.events import Arguments, CallBegin, CallEnd, ParsedAnswer
from tests.engine.frontend.parsing.texts import OBJECTS, check, divided, parse_parts

CALLS = st.lists(st.tuples(st.text(min_size=1, max_size=6), OBJECTS), min_size=1, max_size=3)


def texts(calls: list[tuple[str, dict[str, Any]]], indent: int | None) -> str:
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls], indent=indent)


@given(st.data(), CALLS, st.sampled_from((None, 1)))
def test_lists_of_calls(data: st.DataObject, calls: list[tuple[str, dict[str, Any]]], indent: int | None) -> None:
    answer = check(EnforcedCalls, data.draw(divided(st.just(texts(calls, indent)))))
    assert [(one.name, json.loads(one.arguments)) for one in answer.calls] == calls


@given(st.data(), OBJECTS, st.sampled_from(("", "\n ")))
def test_a_named_call(data: st.DataObject, arguments: dict[str, Any], before: str) -> None:
    answer = check(lambda: EnforcedCall("f"), data.draw(divided(st.just(before + json.dumps(arguments)))))
    assert [(one.name, json.loads(one.arguments)) for one in answer.calls] == [("f", arguments)]


@given(st.data(), CALLS, st.integers(0, 200))
def test_an_output_that_is_cut_off(data: st.DataObject, calls: list[tuple[str, dict[str, Any]]], end: int) -> None:
    """What is there of the arguments is reported."""
    parts = data.draw(divided(st.just(texts(calls, None)[:end])))
    answer: ParsedAnswer = parse_parts(EnforcedCalls(), parts)
    whole = parse_parts(EnforcedCalls(), [texts(calls, None)])
    for found, expected in zip(answer.calls, whole.calls, strict=False):
        assert found.name == expected.name
        assert expected.arguments.startswith(found.arguments)
    assert answer.content == ""


def test_arguments_are_streamed() -> None:
    parser = EnforcedCalls(lambda: "id")
    assert parser.feed('[{"name": "f", "argu') == []
    assert parser.feed('ments": {"a"') == [CallBegin("id", "f"), Arguments('{"a"')]
    assert parser.feed(": 1") == [Arguments(": 1")]
    assert parser.feed('}}, {"name": "g", "arguments": {') == [
        Arguments("}"), CallEnd(), CallBegin("id", "g"), Arguments("{")
    ]  # fmt: skip
    assert parser.finish() == [CallEnd()]
