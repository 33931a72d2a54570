"""Tools, calls and results as plain texts, for chat templates that know nothing of them; in the form of Hermes."""

import json
from collections.abc import Sequence
from typing import Any

from engine.frontend.content_forms import text_of

Message = dict[str, Any]

DESCRIPTION = """\
You can call functions to answer the user. These functions exist, each described in JSON:
<tools>
{tools}
</tools>
To call a function, write a JSON object with its name and its arguments between these tags:
<tool_call>
{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}
</tool_call>
Results come between <tool_response> tags."""


def describe_tools(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """The messages with a description of the tools at the end of the system message, or as one."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = DESCRIPTION.format(tools=listed)
    if messages[0]["role"] in ("system", "developer"):
        content = _joined(messages[0].get("content"), text, "\n\n")
        return [messages[0] | {"content": content}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def write_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with calls as a part of the content, and results as messages of the user."""
    written: list[Message] = []
    after_result = False
    for message in messages:
        if message["role"] == "tool":
            content = _enclosed(message.get("content"), "<tool_response>\n", "\n</tool_response>")
            if after_result:  # one message for all, since some templates want roles in turn
                written[-1]["content"] = _joined(written[-1]["content"], content, "\n")
            else:
                written.append({"role": "user", "content": content})
        elif message.get("tool_calls"):
            kept = {name: value for name, value in message.items() if name != "tool_calls"}
            calls = "\n".join(map(_call, message["tool_calls"]))
            written.append(kept | {"content": _joined(message.get("content"), calls, "\n")})
        else:
            written.append(message)
        after_result = message["role"] == "tool"
    return written


def _call(call: dict[str, Any]) -> str:
    function = call["function"]
    written = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def _parts(content: Any) -> list[dict[str, Any]]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _joined(first: Any, second: Any, between: str) -> Any:
    """Two contents as one; texts stay a text."""
    first, second = _plain(first), _plain(second)
    if not first:
        return second
    if isinstance(first, str) and isinstance(second, str):
        return first + between + second
    return [*_parts(first), *_parts(between), *_parts(second)]


def _plain(content: Any) -> Any:
    """A content as a text, if it has nothing but texts."""
    if isinstance(content, list) and any(part.get("type") != "text" for part in content):
        return content
    return text_of(content)


def _enclosed(content: Any, before: str, after: str) -> Any:
    content = _plain(content)
    if isinstance(content, list):
        return [*_parts(before), *content, *_parts(after)]
    return before + str(content) + after
