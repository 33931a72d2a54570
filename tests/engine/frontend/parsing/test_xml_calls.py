"""Qwen 3 Coder's calls."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.parsing.xml_calls import XmlFormat, typed
from tests.engine.frontend.parsing.texts import calls_in, check_calls, divided, texts_of

TOOLS: dict[str, dict[str, Any]] = {
    "f": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"type": ["object", "null"]}}}
}
WHOLE = """\
<tool_call>
<function=f>
<parameter=a>
5
</parameter>
<parameter=b>
5
</parameter>
</function>
</tool_call>"""
TEXTS = texts_of(
    "<tool_call>", "</tool_call>", "<function=f>", "<function=", "</function>", "<parameter=a>", "</parameter>", "\n",
    "<parameter=b>\nx\n</parameter>\n", WHOLE, "<function=f>\n</function>",
)  # fmt: skip


def form() -> XmlFormat:
    return XmlFormat(TOOLS)


@given(divided(TEXTS))
def test_the_text_may_be_divided_anywhere(parts: list[str]) -> None:
    check_calls(form, parts)


@given(st.dictionaries(st.sampled_from("abc"), st.text(max_size=20), max_size=3))
def test_values_of_strings_are_kept(values: dict[str, str]) -> None:
    members = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    text = f"<tool_call>\n<function=g>\n{members}</function>\n</tool_call>"
    assert calls_in(form(), text) == ("", [("g", values)])


def test_calls() -> None:
    assert calls_in(form(), f"I'll look.\n\n{WHOLE}\n{WHOLE}") == ("I'll look.", [("f", {"a": 5, "b": "5"})] * 2)
    without = WHOLE.replace("<tool_call>\n", "").replace("\n</tool_call>", "")
    assert calls_in(form(), without) == ("", [("f", {"a": 5, "b": "5"})])
    both = "<tool_call><function=f></function>\n<function=g></function></tool_call>"
    assert calls_in(form(), both) == ("", [("f", {}), ("g", {})])
    inner = "<function=f><parameter=b><p></parameter> x</parameter></function>"
    assert calls_in(form(), inner) == ("", [("f", {"b": "<p></parameter> x"})])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n<function=f>\n<parameter=a>\n5",
        "<tool_call>\n<function=f>\n5</function>",
        "<function=>x</function>",
        "<function=" + "f" * 300 + ">",
        '<tool_call>{"name": "f"}</tool_call>',
    ],
)
def test_malformed_calls_are_text(text: str) -> None:
    assert calls_in(form(), text) == (text, [])


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5),
        ("5", {"type": "number"}, 5),
        ("5", {"type": "string"}, "5"),
        ("5", None, "5"),
        ("5", {}, 5),
        ("five", {"type": "integer"}, "five"),
        ("True", {"type": "boolean"}, True),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
        ('"quoted"', {"type": ["string", "integer"]}, '"quoted"'),
        ("2", {"enum": [1, 2]}, 2),
        ("red", {"enum": ["red"]}, "red"),
        ("[1", {"type": "array"}, "[1"),
    ],
)
def test_types_follow_the_schema(text: str, schema: Any, value: Any) -> None:
    assert json.loads(typed(text, schema)) == value
    assert type(json.loads(typed(text, schema))) is type(value)
