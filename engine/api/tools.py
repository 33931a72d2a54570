"""The tools of a chat: which of them the model may call."""

from collections.abc import Sequence
from typing import Any

from engine.errors import RequestError

TOOL_CHOICES = ("none", "auto", "required")
FORM = '{"type": "function", "function": {"name": …, "parameters": {…}}}'

Schema = dict[str, Any]


def check_tools(tools: Sequence[dict[str, Any]] | None) -> dict[str, Schema]:
    """The schemas of the parameters of tools, by name. Raises RequestError for one that is not a function."""
    found: dict[str, Schema] = {}
    for number, tool in enumerate(tools or ()):
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if tool.get("type") != "function" or not isinstance(name, str) or not name:
            raise RequestError(f"tools[{number}] must be {FORM}", "tools")
        assert isinstance(function, dict)
        schema = function.get("parameters") or {}
        if not isinstance(schema, dict):
            raise RequestError(f"tools[{number}].function.parameters must be a JSON schema, an object", "tools")
        if name in found:
            raise RequestError(f"tools[{number}]: there are two functions with the name {name!r}", "tools")
        found[name] = schema
    return found


def callable_tools(tools: Sequence[dict[str, Any]] | None, choice: Any) -> dict[str, Schema]:
    """The tools that the model may call, with the schemas of their parameters.

    Args:
        tools: of the request.
        choice: its `tool_choice`; None is auto if there are tools.

    Raises:
        RequestError: with the field that is not valid or not supported.
    """
    known = check_tools(tools)
    if choice is None:
        choice = "auto" if known else "none"
    named = (
        choice.get("function") if isinstance(choice, dict) and choice.get("type", "function") == "function" else None
    )
    name = named.get("name") if isinstance(named, dict) else None
    if choice not in TOOL_CHOICES and not isinstance(name, str):
        raise RequestError('tool_choice must be "none", "auto", "required" or name a function', "tool_choice")
    if choice == "none":
        return {}
    if not known:
        raise RequestError("tool_choice needs tools", "tool_choice")
    if isinstance(name, str) and name not in known:
        raise RequestError(f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
    if choice != "auto":
        raise RequestError(
            'a call can\'t be enforced yet, since its output would have to be constrained: use tool_choice "auto"',
            "tool_choice",
        )
    for number, tool in enumerate(tools or ()):
        if tool["function"].get("strict"):
            raise RequestError(
                f"tools[{number}].function.strict: arguments can't be constrained to their schema yet; leave it out, "
                "and check them",
                "tools",
            )
    return known
