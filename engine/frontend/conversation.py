"""The messages of a chat, checked and in the form that chat templates expect.

As in other servers, empty `tool_calls` are dropped, and arguments of functions become objects instead of JSON texts.
Contents are kept as they are (a text, parts, or None); `content_forms` converts them for the template.
"""

from collections.abc import Collection
from typing import Any

import msgspec

from engine.errors import RequestError
from engine.frontend.content_parts import MediaPart, read_parts

Message = dict[str, Any]


def shape_conversation(
    messages: list[Message], takes: Collection[str] = (), media: list[MediaPart] | None = None
) -> list[Message]:
    """The messages in the form that chat templates expect.

    Args:
        messages: of the request.
        takes: kinds of inputs (image, audio, video) that the model takes.
        media: the inputs are appended to it, in order; the messages have parts such as {"type": "image"} for them.

    Raises:
        RequestError: with the field, if there are no messages or one is not valid.
    """
    if not messages:
        raise RequestError("messages is an empty list", "messages")
    found = [] if media is None else media
    return [_shape(message, f"messages[{number}]", takes, found) for number, message in enumerate(messages)]


def _shape(message: Any, field: str, takes: Collection[str], media: list[MediaPart]) -> Message:
    if not isinstance(message, dict):
        raise RequestError(f"{field} must be an object", field)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{field}.role must be a string", f"{field}.role")
    shaped = dict(message)
    if "content" in message:
        shaped["content"] = _content(message["content"], f"{field}.content", takes, media)
    if message.get("function_call"):
        raise RequestError(f"{field}.function_call is not supported here: use tool_calls", f"{field}.function_call")
    calls = shaped.pop("tool_calls", None)
    if calls is not None and not isinstance(calls, list):
        raise RequestError(f"{field}.tool_calls must be a list", f"{field}.tool_calls")
    if calls:
        if role != "assistant":
            raise RequestError(
                f"{field}.tool_calls: a message with role {role!r} can't have them", f"{field}.tool_calls"
            )
        shaped["tool_calls"] = [_call(call, f"{field}.tool_calls[{at}]") for at, call in enumerate(calls)]
    for name in ("name", "tool_call_id"):
        if not isinstance(message.get(name, ""), str | None):
            raise RequestError(f"{field}.{name} must be a string", f"{field}.{name}")
    return shaped


def _content(content: Any, field: str, takes: Collection[str], media: list[MediaPart]) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{field} must be a string or a list of parts", field)
    return read_parts(content, field, takes, media)


def _call(call: Any, field: str) -> dict[str, Any]:
    """A tool call, with its arguments as an object."""
    if not isinstance(call, dict):
        raise RequestError(f"{field} must be an object", field)
    if call.get("type", "function") != "function":
        raise RequestError(f"{field}.type must be 'function', not {call['type']!r}", f"{field}.type")
    if not isinstance(call.get("id", ""), str | None):
        raise RequestError(f"{field}.id must be a string", f"{field}.id")
    function = call.get("function")
    field += ".function"
    if not isinstance(function, dict):
        raise RequestError(f"{field} must be an object", field)
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{field}.name must be a string", f"{field}.name")
    return call | {"function": function | {"arguments": _arguments(function.get("arguments"), f"{field}.arguments")}}


def _arguments(given: Any, field: str) -> dict[str, Any]:
    if isinstance(given, str) and given.strip():
        try:
            given = msgspec.json.decode(given)  # fails for a lone surrogate, which can't be tokenized
        except (msgspec.DecodeError, RecursionError) as error:
            raise RequestError(f"{field} is not valid JSON", field) from error
    given = given or {}
    if not isinstance(given, dict):
        raise RequestError(f"{field} must be a JSON object", field)
    return given
