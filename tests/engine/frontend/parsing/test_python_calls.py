"""Calls as a list of Python calls."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.parsing.call_parser import CallParser
from engine.frontend.parsing.events import Content
from engine.frontend.parsing.python_calls import PythonFormat
from tests.engine.frontend.parsing.texts import JSON_VALUES, calls_in, check_calls, divided, texts_of

TEXTS = texts_of(
    "[f(", "[f(a=1)]", '[f(a="x)]"), g()]', "<|python_start|>", "<|python_end|>", "[", "]",
    ", g(b='''x''')", '"""', "a=",
    "[f(a={'k': [1, -2.5, None, True]})]",
)  # fmt: skip


def form() -> PythonFormat:
    return PythonFormat(("f", "g"))


@given(divided(TEXTS))
def test_the_text_may_be_divided_anywhere(parts: list[str]) -> None:
    check_calls(form, parts)


@given(st.dictionaries(st.sampled_from(("a", "b", "key_1")), JSON_VALUES, max_size=3))
def test_literals_are_kept(arguments: dict[str, Any]) -> None:
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    expected = json.loads(json.dumps(arguments))
    assert calls_in(form(), f"[f({written})]") == ("", [("f", expected)])
    assert calls_in(form(), f"Now: <|python_start|>[x.y({written}), g()]<|python_end|>") == (
        "Now:", [("x.y", expected), ("g", {})]
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "[]", "[1, 2]", "[h()]", "[f(1)]", "[f(a=1)", "[f(a=x)]", "[f(a=open('x'))]", "[f(a=1e999)]", "[f(**{})]",
        "[f(a=b'x')]", "[f(a='\\ud800')]", "[f(a=1) # ]", "[link](url)", "[f(a='x\ny')]", "[f(a={1: 2})]", "[f(a=(]",
        "[f(a=" + "[" * 500 + "]" * 500 + ")]", "[f(a=" + "1" * 5000 + ")]",
    ],
)  # fmt: skip
def test_what_is_no_list_of_calls_with_literals_is_text(text: str) -> None:
    assert calls_in(form(), text) == (text, [])


def test_another_list_is_not_held_back() -> None:
    for text, held in (("[link", True), ("[link]", False), ("[f(", True), ("[h(", False)):
        events = CallParser(form()).feed(text)
        assert "".join(one.text for one in events if isinstance(one, Content)) == ("" if held else text)


def test_json_s_words_are_values() -> None:
    assert calls_in(form(), "[f(a=true, b=null, c=(1, 2))]") == ("", [("f", {"a": True, "b": None, "c": [1, 2]})])
