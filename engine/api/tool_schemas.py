"""What outputs must conform to where tools are called: a call that the request enforces, or strict arguments."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from engine.frontend.structured_outputs import StructuredOutputs

Schema = dict[str, Any]

COMPOSED = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf", "anyOf", "oneOf",
                      "$ref", "if", "not"})  # fmt: skip
MOST_CALLS = 16  # of one message; a small model may repeat a call without end
ANY_OBJECT: Schema = {"type": "object"}
HERMES_OPEN = "<tool_call>"
FIELD = "tools"


def one_call(schema: Schema) -> StructuredOutputs:
    """An output that is the arguments of a tool."""
    return StructuredOutputs(json=arguments_schema(schema), field=FIELD)


def some_calls(tools: Mapping[str, Schema], *, parallel: bool) -> StructuredOutputs:
    """An output that is a list of objects, each with the name of a tool and then its arguments.

    The schema of a tool's parameters becomes a definition, and references within it lead there.
    """
    schemas = map(arguments_schema, tools.values())
    definitions = {str(number): _moved(schema, f"#/$defs/{number}") for number, schema in enumerate(schemas)}
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for number, name in enumerate(tools)
    ]
    most = MOST_CALLS if parallel else 1
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most, "$defs": definitions}
    return StructuredOutputs(json=schema, field=FIELD)


def strict_arguments(tools: Mapping[str, Schema], strict: Collection[str]) -> StructuredOutputs:
    """Free text in which all calls, in the form of Hermes, are of tools; strict ones conform to their schemas."""
    structures = [
        {
            "begin": f'{HERMES_OPEN}\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ',
            "schema": arguments_schema(schema) if name in strict else ANY_OBJECT,
            "end": "}\n</tool_call>",
        }
        for name, schema in tools.items()
    ]
    return StructuredOutputs(structural_tag={"structures": structures, "triggers": [HERMES_OPEN]}, field=FIELD)


def arguments_schema(schema: Schema) -> Schema:
    """The schema of a tool's arguments: an object, without parameters that the tool does not have."""
    closed = {"additionalProperties": False} if COMPOSED.isdisjoint(schema) else {}
    return ANY_OBJECT | closed | schema


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own root, and to what is below it, lead to another place."""
    if isinstance(schema, list):
        return [_moved(one, place) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = place + target[1:]
    return moved
