"""Calls in Qwen 3 Coder's form, in which each argument is a text between tags:

<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>

The tags are on lines of their own; `<tool_call>` is often missing. Arguments get their types from the tool's schema.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from engine.frontend.parsing.call_ids import new_id
from engine.frontend.parsing.call_parser import StateReader
from engine.frontend.parsing.events import Arguments, CallBegin, CallEnd, Event

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
AFTER_VALUE = (PARAMETER, FUNCTION_END)
LONGEST_TAG = max(map(len, (FUNCTION, CLOSE, *AFTER_VALUE)))
LONGEST_NAME = 256
SPACES = " \t\r\n"
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
KINDS: dict[type, str] = {dict: "object", list: "array", bool: "boolean", int: "integer", float: "number"}

Schemas = Mapping[str, dict[str, Any]]


class XmlFormat:
    """A `CallFormat`."""

    markers = (OPEN, FUNCTION)
    leading = ()
    special = (OPEN, CLOSE)

    def __init__(self, tools: Schemas):
        """`tools` has the schemas of the tools' parameters, by name."""
        self._tools = tools

    def reader(self, marker: str, begin: int) -> "XmlCall":
        return XmlCall(begin, self._tools, named=marker == FUNCTION)


class XmlCall(StateReader):
    """Reads one function, and the closing tag of the call."""

    def __init__(self, begin: int, tools: Schemas, *, named: bool):
        """`named`: the text begins with the name."""
        super().__init__(begin, self._read_name if named else self._read_function)
        self._searched = begin  # no value ends before
        self._tools = tools
        self._name = self._key = ""
        self._values: dict[str, str] = {}

    # Each state returns False if it needs more text.

    def _next_tag(self, text: str, *tags: str) -> str:
        """Read the next one of these tags; empty if it isn't there yet. Another text is a failure."""
        self._at = _skip_spaces(text, self._at)
        found = next((tag for tag in tags if text.startswith(tag, self._at)), "")
        self._at += len(found)
        if not found:
            beginning = text[self._at : self._at + LONGEST_TAG]
            self.failed = not any(tag.startswith(beginning) for tag in tags)
        return found

    def _next_name(self, text: str) -> str:
        """Read a name and the `>` after it; empty if it isn't there yet."""
        end = text.find(">", self._at, self._at + LONGEST_NAME + 1)
        name = text[self._at : end if end >= 0 else self._at + LONGEST_NAME + 1]
        if any(character in name for character in "<\r\n") or len(name) > LONGEST_NAME or (end >= 0 and not name):
            self.failed = True
        if self.failed or end < 0:
            return ""
        self._at = end + 1
        return name

    def _read_function(self, text: str, _events: list[Event]) -> bool:
        found = self._next_tag(text, FUNCTION)
        self._state = self._read_name if found else self._state
        return bool(found)

    def _read_name(self, text: str, _events: list[Event]) -> bool:
        self._name = self._next_name(text)
        self._state = self._read_body if self._name else self._state
        return bool(self._name)

    def _read_body(self, text: str, events: list[Event]) -> bool:
        found = self._next_tag(text, *AFTER_VALUE)
        if found == PARAMETER:
            self._state = self._read_key
        elif found:
            self._complete = True
            self.end = self._at
            events += [CallBegin(new_id(), self._name), Arguments(self._arguments()), CallEnd()]
            self._state = self._read_close
        return bool(found)

    def _read_key(self, text: str, _events: list[Event]) -> bool:
        self._key = self._next_name(text)
        if self._key:
            self._searched = self._at
            self._state = self._read_value
        return bool(self._key)

    def _read_value(self, text: str, _events: list[Event]) -> bool:
        """Read up to an end that another tag follows: the value itself may contain tags."""
        at = text.find(PARAMETER_END, self._searched)
        if at < 0:
            self._searched = max(self._searched, len(text) - len(PARAMETER_END) + 1)
            return False
        after = _skip_spaces(text, at + len(PARAMETER_END))
        if any(text.startswith(tag, after) for tag in AFTER_VALUE):
            self._values[self._key] = text[self._at : at].removeprefix("\n").removesuffix("\n")
            self._at = after
            self._state = self._read_body
            return True
        beginning = text[after : after + LONGEST_TAG]
        if any(tag.startswith(beginning) for tag in AFTER_VALUE):
            return False
        self._searched = at + 1
        return True

    def _read_close(self, text: str, _events: list[Event]) -> bool:
        return self._read_closing(text, _skip_spaces(text, self._at), CLOSE)

    def _arguments(self) -> str:
        properties = self._tools.get(self._name, {}).get("properties")
        known = properties if isinstance(properties, dict) else {}
        members = (f"{as_json(key)}: {typed(value, known.get(key))}" for key, value in self._values.items())
        return "{" + ", ".join(members) + "}"


def _skip_spaces(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACES:
        at += 1
    return at


def as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def typed(text: str, schema: Any) -> str:
    """The JSON of an argument that is written as a text; a string, unless its schema allows what the text is."""
    types = types_of(schema)
    if types == {"string"}:
        return as_json(text)
    written = text.strip()
    written = PYTHON_WORDS.get(written, written)
    try:
        kind = KINDS.get(type(msgspec.json.decode(written)), "null" if written == "null" else "string")
    except (ValueError, RecursionError):
        kind = "string"
    accepted = {kind, "number"} if kind == "integer" else {kind}
    return written if kind != "string" and accepted & types else as_json(text)


def types_of(schema: Any) -> set[str]:
    """The JSON types that a schema allows: all if it does not say, only strings if there is no schema."""
    if not isinstance(schema, dict):
        return {"string"}
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {one for one in given if isinstance(one, str)}
    for name in ("anyOf", "oneOf"):
        options = schema.get(name)
        if isinstance(options, list) and options:
            return set[str]().union(*map(types_of, options))
    for values in (schema.get("enum"), [schema["const"]] if "const" in schema else None):
        if isinstance(values, list):
            return {"null" if one is None else KINDS.get(type(one), "string") for one in values}
    return {"string", "null", *KINDS.values()}
