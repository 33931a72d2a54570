"""Messages of Anthropic's API, checked and as messages of a chat.

A chat has the system prompt and the results of tools as messages of their own. Each message and part therefore keeps
its place in the request, for errors that are found later.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from engine.errors import RequestError

Object = dict[str, Any]
Kinds = Mapping[str, type]

# Fields of each block, besides `type`: those that it must have, and those that it may have.
BLOCKS: dict[str, tuple[Kinds, Kinds]] = {
    "text": ({"text": str}, {}),
    "image": ({"source": dict}, {}),
    "thinking": ({"thinking": str}, {"signature": str}),
    "tool_use": ({"id": str, "name": str, "input": dict}, {}),
    "tool_result": ({"tool_use_id": str}, {"content": object, "is_error": bool}),
}
# Blocks of each role, of the system prompt, and of results.
ALLOWED = {
    "system": ("text",),
    "user": ("text", "image", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "result": ("text", "image"),
}
SOURCES: dict[str, Kinds] = {"base64": {"media_type": str, "data": str}, "url": {"url": str}}
MEDIA_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")
TYPE_NAMES = {str: "a string", dict: "an object", bool: "true or false", list: "a list", int: "an integer"}
# A place in a chat; of a part, with the place of its text or of the URL of its image.
CHAT_PLACE = re.compile(r"\bmessages\[(\d+)\](\.content(?:\[(\d+)\](?:(\.text\b)|\.image_url(?:\.url)?)?)?)?")
ERROR = "Error: "  # before the result of a tool that failed, since a chat has no field for it


class Place(NamedTuple):
    """Where a message of a chat and the parts of its content stand in the request."""

    message: str
    parts: list[str]


class ChatMessages:
    """The messages of a chat, made from those of a request."""

    def __init__(self, system: str | list[Object] | None, messages: list[Object]):
        """Raises RequestError, with the field, for what is not valid or not supported."""
        self.messages: list[Object] = []
        self._places: list[Place] = []
        self._call_ids: set[str] = set()
        if system:
            self._add("system", "system", *_parts(system, "system", "system"))
        for number, message in enumerate(messages):
            field = f"messages[{number}]"
            check_fields(message, field, {"role": str, "content": object}, {})
            role, content = message["role"], message["content"]
            if role not in ("user", "assistant"):
                raise RequestError(f"{field}.role must be 'user' or 'assistant', not {role!r}", f"{field}.role")
            if role == "user":
                self._add_user(content, field)
            else:
                self._add_assistant(content, field)
        for message in self.messages:
            message["content"] = _plain(message["content"], called="tool_calls" in message)

    @property
    def is_continued(self) -> bool:
        """Whether the last message is the assistant's, and the output shall continue it."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def restore_places(self, text: str) -> str:
        """An error of the chat with the places of the request instead of those of the chat."""

        def restored(match: re.Match[str]) -> str:
            number, content, part = int(match[1]), match[2], match[3]
            if number >= len(self._places):
                return match[0]
            place = self._places[number]
            if content is None or (part is None and len(place.parts) != 1) or int(part or 0) >= len(place.parts):
                return place.message
            found = place.parts[int(part or 0)]
            # A content that is a string has no blocks.
            return found + match[4] if match[4] and found.endswith("]") else found

        return CHAT_PLACE.sub(restored, text)

    def _add(self, role: str, place: str, parts: list[Object], places: list[str], **more: Any) -> None:
        """Add a message; messages of the user that follow each other become one, as in Anthropic's API."""
        if role == "user" and self.messages and self.messages[-1]["role"] == "user":
            parts = [*self.messages.pop()["content"], *parts]
            place, before = self._places.pop()
            places = [*before, *places]
        self.messages.append({"role": role, "content": parts, **more})
        self._places.append(Place(place, places))

    def _add_user(self, content: Any, field: str) -> None:
        parts: list[Object] = []
        places: list[str] = []
        for block, place in blocks_of(content, f"{field}.content", "user"):
            if block["type"] != "tool_result":
                parts.append(_part(block, place))
                places.append(_place(block, place))
                continue
            if parts:
                self._add("user", field, parts, places)
                parts, places = [], []
            self._add_result(block, place)
        if parts or not content:
            self._add("user", field, parts, places)

    def _add_result(self, block: Object, place: str) -> None:
        call_id = block["tool_use_id"]
        if call_id not in self._call_ids:
            raise RequestError(
                f"{place}.tool_use_id is {call_id!r}, which no tool_use before it has", f"{place}.tool_use_id"
            )
        parts, places = _parts(block.get("content") or "", f"{place}.content", "result")
        if block.get("is_error"):
            if parts and parts[0]["type"] == "text":  # one text, since templates join parts by newlines
                parts[0] = {"type": "text", "text": ERROR + parts[0]["text"]}
            else:
                parts, places = [{"type": "text", "text": ERROR}, *parts], [place, *places]
        self._add("tool", place, parts, places, tool_call_id=call_id)

    def _add_assistant(self, content: Any, field: str) -> None:
        parts: list[Object] = []
        places: list[str] = []
        calls: list[Object] = []
        thoughts: list[str] = []
        for block, place in blocks_of(content, f"{field}.content", "assistant"):
            if block["type"] == "text":
                parts.append({"type": "text", "text": block["text"]})
                places.append(place)
            elif block["type"] == "thinking":
                thoughts.append(block["thinking"])
            else:
                function = {"name": block["name"], "arguments": block["input"]}
                calls.append({"id": block["id"], "type": "function", "function": function})
                self._call_ids.add(block["id"])
        more: Object = {"tool_calls": calls} if calls else {}
        if any(thoughts):
            more["reasoning_content"] = "\n\n".join(filter(None, thoughts))
        self._add("assistant", field, parts, places, **more)


def blocks_of(content: Any, field: str, role: str) -> list[tuple[Object, str]]:
    """The checked blocks of a content, each with its place; a text is one block."""
    if isinstance(content, str):
        return [({"type": "text", "text": content}, field)] if content else []
    if not isinstance(content, list):
        raise RequestError(f"{field} must be a string or a list of blocks", field)
    found: list[tuple[Object, str]] = []
    for number, block in enumerate(content):
        place = f"{field}[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in ALLOWED[role]:
            known = ", ".join(ALLOWED[role])
            raise RequestError(f"{place}.type {kind!r} is not supported here, only {known}", f"{place}.type")
        required, optional = BLOCKS[kind]
        check_fields(block, place, {"type": str, **required}, optional)
        found.append((block, place))
    return found


def _parts(content: Any, field: str, role: str) -> tuple[list[Object], list[str]]:
    """A content as parts of a message of a chat, and their places."""
    found = blocks_of(content, field, role)
    return [_part(*one) for one in found], [_place(*one) for one in found]


def _plain(parts: list[Object], *, called: bool) -> Any:
    """A content as chats usually have it: a text if there is but one; none beside calls."""
    if not parts:
        return None if called else ""
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts


def _place(block: Object, place: str) -> str:
    return f"{place}.source" if block["type"] == "image" else place


def _part(block: Object, place: str) -> Object:
    """A text or an image as a part of a message of a chat."""
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    source, place = block["source"], f"{place}.source"
    kind = source.get("type")
    if kind not in tuple(SOURCES):  # which may be anything
        known = " and ".join(SOURCES)
        raise RequestError(f"{place}.type {kind!r} is not supported here, only {known}", f"{place}.type")
    check_fields(source, place, {"type": str, **SOURCES[kind]}, {})
    if kind == "url":
        return {"type": "image_url", "image_url": {"url": source["url"]}}
    if source["media_type"] not in MEDIA_TYPES:
        known = ", ".join(MEDIA_TYPES)
        raise RequestError(f"{place}.media_type must be one of {known}", f"{place}.media_type")
    url = f"data:{source['media_type']};base64,{source['data']}"
    return {"type": "image_url", "image_url": {"url": url}}


def check_fields(given: Any, field: str, required: Kinds, optional: Kinds) -> None:
    """Check the fields of an object; others are refused unless they ask for nothing.

    Args:
        given: the object.
        field: its place in the request.
        required: types of the fields that it must have; `object` is any.
        optional: types of those that it may have or that are null. `cache_control` may always be there: prefixes are
            always cached.

    Raises:
        RequestError: with the field.
    """
    if not isinstance(given, dict):
        raise RequestError(f"{field} must be an object", field)
    for name in required:
        if given.get(name) is None:
            raise RequestError(f"{field}.{name} is missing", f"{field}.{name}")
    known = {**optional, **required}
    for name, value in given.items():
        if not value and (name not in known or value is None):
            continue
        if name not in known:
            if name != "cache_control":
                raise RequestError(f"{field}.{name} is not supported here", f"{field}.{name}")
        elif not isinstance(value, known[name]):
            raise RequestError(f"{field}.{name} must be {TYPE_NAMES[known[name]]}", f"{field}.{name}")
