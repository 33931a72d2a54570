"""Items of responses as messages of a chat."""

import uuid
from collections.abc import Sequence
from typing import Any

from engine.errors import RequestError

Item = dict[str, Any]
Message = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
TEXTS = ("input_text", "output_text", "text")
PARTS = (*TEXTS, "input_image", "refusal")


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def input_items(given: str | Sequence[Item]) -> list[Item]:
    """The input of a request as items, each with a type and an id; a text is a message of the user."""
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    items = []
    for number, item in enumerate(given):
        kind = item.get("type") or "message"
        if kind not in PREFIXES:
            known = ", ".join(PREFIXES)
            raise RequestError(f"input[{number}].type {kind!r} is not supported: use {known}", f"input[{number}].type")
        items.append({"id": new_id(PREFIXES[kind]), "type": kind} | {k: v for k, v in item.items() if v is not None})
    return items


class Messages:
    """The messages of a chat, made from items.

    The reasoning, the text and the calls of one turn of the model are one message. `places` says for each message
    where the request has it, for errors.
    """

    def __init__(self, instructions: str | None = None):
        self.messages: list[Message] = []
        self.places: list[str] = []
        self._call_ids: set[str] = set()
        if instructions:
            self._append({"role": "system", "content": instructions}, "instructions")

    def add(self, items: Sequence[Item], place: str = "") -> None:
        """Add items.

        Args:
            items: with types that `input_items` accepts.
            place: of all the items in the request; "": they are its `input`.

        Raises:
            RequestError: with the field, if an item is not valid.
        """
        for number, item in enumerate(items):
            where = place or f"input[{number}]"
            if item["type"] == "message":
                self._add_message(item, where)
            elif item["type"] == "reasoning":
                self._add_reasoning(item, where)
            elif item["type"] == "function_call":
                self._add_call(item, where)
            else:
                self._add_result(item, where)

    def _append(self, message: Message, place: str) -> None:
        self.messages.append(message)
        self.places.append(place)

    def _add_message(self, item: Item, where: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}", f"{where}.role")
        content = read_content(item.get("content"), f"{where}.content")
        if role != "assistant":
            self._append({"role": role, "content": content}, where)
            return
        turn = self._turn(where)
        if turn["content"] is not None or "tool_calls" in turn:
            turn = self._new_turn(where)
        turn["content"] = content

    def _add_reasoning(self, item: Item, where: str) -> None:
        if item.get("encrypted_content"):
            field = f"{where}.encrypted_content"
            raise RequestError(f"{field} can't be read here: reasoning of this server is not encrypted", field)
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list) or not all(
            isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts
        ):
            raise RequestError(f"{where}.content must be a list of texts", f"{where}.content")
        if text := "\n".join(part["text"] for part in parts):
            self._new_turn(where)["reasoning_content"] = text

    def _add_call(self, item: Item, where: str) -> None:
        for name in ("call_id", "name", "arguments"):
            if not isinstance(item.get(name), str):
                raise RequestError(f"{where}.{name} must be a string", f"{where}.{name}")
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        self._turn(where).setdefault("tool_calls", []).append(call)
        self._call_ids.add(item["call_id"])

    def _add_result(self, item: Item, where: str) -> None:
        call_id = item.get("call_id")
        if not isinstance(call_id, str) or call_id not in self._call_ids:
            field = f"{where}.call_id"
            raise RequestError(f"{field} is {call_id!r}, which no function_call before it has", field)
        content = read_content(item.get("output"), f"{where}.output")
        self._append({"role": "tool", "tool_call_id": call_id, "content": content}, where)

    def _turn(self, where: str) -> Message:
        """The message of the model's turn, which may have just begun."""
        last = self.messages[-1] if self.messages else {}
        return last if last.get("role") == "assistant" else self._new_turn(where)

    def _new_turn(self, where: str) -> Message:
        self._append({"role": "assistant", "content": None}, where)
        return self.messages[-1]


def read_content(content: Any, field: str) -> str | list[Item]:
    """A content in the form of chats: a text, or parts of which one is an image."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{field} must be a string or a list of parts", field)
    parts = [_part(part, f"{field}[{number}]") for number, part in enumerate(content)]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])
    return parts


def _part(part: Any, field: str) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PARTS:
        raise RequestError(f"{field} of type {kind!r} is not supported: use input_text or input_image", field)
    if kind == "input_image":
        if part.get("file_id"):
            raise RequestError(f"{field}.file_id is not supported: use image_url", f"{field}.file_id")
        return {name: part[name] for name in ("type", "image_url", "detail") if part.get(name) is not None}
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise RequestError(f"{field} must have a text", field)
    return {"type": "text", "text": text}
