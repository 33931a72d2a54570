"""Calls as JSON objects: those of Hermes and Qwen, Llama 3 and Mistral."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.frontend.parsing.call_parser import CallParser
from engine.frontend.parsing.events import Content
from engine.frontend.parsing.json_calls import JsonFormat
from engine.frontend.parsing.mistral_calls import MistralFormat
from tests.engine.frontend.parsing.texts import OBJECTS, calls_in, check_calls, divided, texts_of

NAMES = ("f", "get_weather")


def hermes() -> JsonFormat:
    return JsonFormat(markers=("<tool_call>",), close="</tool_call>")


def llama() -> JsonFormat:
    return JsonFormat(markers=("<|python_tag|>",), names=NAMES)


def written(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


CALLS = st.builds(written, st.sampled_from((*NAMES, "g")), OBJECTS, st.sampled_from(("arguments", "parameters")))
HERMES_TEXTS = texts_of(
    "<tool_call>", "</tool_call>", CALLS, CALLS.map(lambda one: f"<tool_call>\n{one}\n</tool_call>")
)
LLAMA_TEXTS = texts_of("<|python_tag|>", "; ", CALLS, CALLS.map(lambda one: f"<|python_tag|>{one}"))
MISTRAL_TEXTS = texts_of(
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]abc", CALLS, CALLS.map(lambda one: f"[TOOL_CALLS][{one}]"),
    OBJECTS.map(lambda one: f"[TOOL_CALLS]f[ARGS]{json.dumps(one)}"),
)  # fmt: skip


@given(divided(HERMES_TEXTS))
@example(["<tool_call>", '[{"name": "f", "arguments": {}}]'])
@example(list('<tool_call>[{"name": "f", "arguments": {}}'))
def test_hermes_does_not_depend_on_how_the_text_is_divided(parts: list[str]) -> None:
    check_calls(hermes, parts)


@given(divided(LLAMA_TEXTS))
def test_llama_does_not_depend_on_how_the_text_is_divided(parts: list[str]) -> None:
    check_calls(llama, parts)


@given(divided(MISTRAL_TEXTS))
def test_mistral_does_not_depend_on_how_the_text_is_divided(parts: list[str]) -> None:
    answer = check_calls(MistralFormat, parts)
    assert all(re.fullmatch("[A-Za-z0-9]{9}", call.id) for call in answer.calls)


@given(st.lists(st.tuples(st.sampled_from(NAMES), OBJECTS), min_size=1, max_size=3), st.text(max_size=5))
def test_arguments_are_those_that_the_model_wrote(calls: list[tuple[str, dict[str, Any]]], before: str) -> None:
    before = before.replace("<", "")
    texts = [written(*call) for call in calls]
    expected = [(name, json.loads(json.dumps(arguments))) for name, arguments in calls]
    tagged = "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in texts)
    assert calls_in(hermes(), f"{before}\n{tagged}\n") == (before.rstrip(), expected)
    assert calls_in(llama(), "; ".join(written(*call, "parameters") for call in calls)) == ("", expected)
    assert calls_in(MistralFormat(), f"[TOOL_CALLS] [{', '.join(texts)}]") == ("", expected)
    headed = "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)
    assert calls_in(MistralFormat(), headed) == ("", expected)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        ("Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>", "Let me see.", [("f", {})]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", {"a": 1})]),  # the end tag may be missing
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", {"a": 1})]),
        ('<tool_call>{"name": "f"}</tool_call> Done.', " Done.", [("f", {})]),
        ('<tool_call>{"arguments": {"name": "g"}, "name": "f"}</tool_call>', "", [("f", {"name": "g"})]),
    ],
)  # fmt: skip
def test_hermes(text: str, content: str, calls: list[Any]) -> None:
    assert calls_in(hermes(), text) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "f", "arguments": {"a": 1}',
        '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>',
        "<tool_call>f(a=1)</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>" * 3,
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 20_000,
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 20_000 + "1" + "}" * 20_001,
    ],
)
def test_malformed_calls_are_text(text: str) -> None:
    assert calls_in(hermes(), text) == (text, [])


def test_llama_calls_need_no_marker_if_they_name_a_tool() -> None:
    assert calls_in(llama(), '{"name": "f", "parameters": {"a": 1}}') == ("", [("f", {"a": 1})])
    assert calls_in(llama(), '<|python_tag|>{"type": "function", "name": "g", "parameters": {}}') == ("", [("g", {})])
    for text in ('{"name": "Ann", "age": 5}', '{"name": "g", "parameters": {}}', 'So: {"name": "f", "parameters": {}}'):
        assert calls_in(llama(), text) == (text, [])


def test_an_answer_in_json_is_not_held_back() -> None:
    parser = CallParser(llama())
    assert parser.feed('{"age"') == []
    assert "".join(one.text for one in parser.feed(': 5, "x') if isinstance(one, Content)) == '{"age": 5, "x'


def test_mistral_heads() -> None:
    assert calls_in(MistralFormat(), '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}') == ("", [("f", {"a": 1})])
    assert calls_in(MistralFormat(), 'Yes.[TOOL_CALLS]f{"a": 1}') == ("Yes.", [("f", {"a": 1})])
    for text in ("[TOOL_CALLS]f", "[TOOL_CALLS]f[ARGS]{", "[TOOL_CALLS]a b {}", "[TOOL_CALLS]" + "a" * 600 + "{}"):
        assert calls_in(MistralFormat(), text) == (text, [])
