"""Schemas that enforce calls: what conforms to them, with references of every kind."""

import json
from typing import Any

import jsonschema
import pytest

from engine.api.tool_schemas import arguments_schema, one_call, some_calls, strict_arguments
from engine.frontend.structured_outputs import StructuredOutputs

NODE = {
    "type": "object",
    "properties": {"value": {"$ref": "#/$defs/value"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["value", "next"],
    "$defs": {"value": {"type": "integer"}},
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LIST = {"value": 1, "next": {"value": 2, "next": None}}


def accepts(wanted: StructuredOutputs, value: Any) -> bool:
    schema = wanted.json
    assert isinstance(schema, dict)
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


@pytest.mark.parametrize(
    ("calls", "conforms"),
    [
        ([("node", LIST)], True),
        ([("weather", {"city": "Rome"}), ("node", LIST)], True),
        ([], False),
        ([("other", {})], False),
        ([("node", {"city": "Rome"})], False),
        ([("node", {"value": "1", "next": None})], False),
        ([("node", {"value": 1, "next": {"value": "2", "next": None}})], False),
        ([("weather", {"city": "Rome", "more": 1})], False),
        ([("nothing", {})], True),
        ([("nothing", {"a": 1})], False),
    ],
)
def test_lists_of_calls(calls: list[tuple[str, Any]], conforms: bool) -> None:
    tools = {"node": NODE, "weather": CITY, "nothing": {}}
    value = [{"name": name, "arguments": arguments} for name, arguments in calls]
    assert accepts(some_calls(tools, parallel=True), value) == conforms
    assert accepts(some_calls(tools, parallel=False), value) == (conforms and len(calls) == 1)
    if len(calls) == 1 and calls[0][0] in tools:
        name, arguments = calls[0]
        assert accepts(one_call(tools[name]), arguments) == conforms


def test_composed_schemas_stay_open() -> None:
    assert "additionalProperties" not in arguments_schema({"allOf": [CITY]})
    assert arguments_schema({"additionalProperties": True})["additionalProperties"] is True


def test_strict_tools_among_others() -> None:
    wanted = strict_arguments({'a"b': CITY, "free": CITY}, {'a"b'})
    tag = json.loads(wanted.to_grammar().text)
    assert [one["schema"].get("required") for one in tag["structures"]] == [["city"], None]
    assert tag["structures"][0]["begin"] == '<tool_call>\n{"name": "a\\"b", "arguments": '
