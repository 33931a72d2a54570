"""gpt-oss's channels."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.parsing.events import Content, Reasoning, parse_answer
from engine.frontend.parsing.harmony import MARKS, HarmonyParser
from tests.engine.frontend.parsing.texts import OBJECTS, check, divided, parsed, texts_of

PROMPT = "<|start|>user<|message|>hi<|end|><|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>So.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Yes."


def call(name: str, body: str) -> str:
    return f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{body}"


CALLS = OBJECTS.map(lambda one: call("f", json.dumps(one)) + "<|call|>")
TEXTS = texts_of(*MARKS, THOUGHT, FINAL, CALLS, "assistant", " to=functions.f", "analysis", "final", "commentary")


def parser(prompt: str = PROMPT, *, calls: bool = True, reasoning: bool = True) -> HarmonyParser:
    return HarmonyParser(prompt, calls=calls, reasoning=reasoning)


@given(divided(TEXTS), st.booleans(), st.booleans())
def test_the_text_may_be_divided_anywhere(parts: list[str], calls: bool, reasoning: bool) -> None:
    answer = check(lambda: parser(calls=calls, reasoning=reasoning), parts)
    assert calls or not answer.calls
    assert reasoning or not answer.reasoning


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        (THOUGHT + FINAL, "Yes.", "So.", []),
        ("<|channel|>final<|message|>Yes.<|return|>", "Yes.", "", []),
        (THOUGHT + call("f", '{"a": 1}'), "", "So.", [("f", '{"a": 1}')]),
        (" to=functions.f<|channel|>commentary<|message|>{}<|call|>", "", "", [("f", "{}")]),
        (THOUGHT + call("f", '{"a": 1'), '{"a": 1', "So.", []),
        ("<|channel|>commentary<|message|>I'll look.<|end|>" + call("f", "{}"), "I'll look.", "", [("f", "{}")]),
        (call("f", "{}") + "<|call|>" + call("g", "{}"), "", "", [("f", "{}"), ("g", "{}")]),
        ("<|channel|>analysis<|message|>cut", "", "cut", []),
        ("<|channel|>anal", "", "", []),
        ("Hello", "Hello", "", []),
        ("", "", "", []),
        ("<|channel|>" + "x" * 600, "<|channel|>" + "x" * 600, "", []),
    ],
)
def test_channels(text: str, content: str, reasoning: str, calls: list[Any]) -> None:
    assert parsed(parse_answer(parser(), text)) == (content, reasoning, calls)


def test_calls_are_text_where_there_are_no_tools() -> None:
    assert parsed(parse_answer(parser(calls=False), call("f", '{"a": 1}'))) == ('{"a": 1}', "", [])


def test_a_message_that_is_continued() -> None:
    begun = PROMPT + "<|channel|>analysis<|message|>So"
    assert parsed(parse_answer(parser(begun), " it is.<|end|>" + FINAL)) == ("Yes.", " it is.", [])
    assert parsed(parse_answer(parser("the end of a long message"), " more")) == (" more", "", [])


def test_text_is_streamed() -> None:
    reader = parser()
    assert reader.feed("<|channel|>analysis<|message|>So") == [Reasoning("So")]
    assert reader.feed(" x<|en") == [Reasoning(" x")]
    assert reader.feed("d|><|start|>assistant<|channel|>final<|message|>Y") == [Content("Y")]
