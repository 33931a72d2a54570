"""The tools of a chat: which of them the model may call, or must."""

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.api.tool_schemas import one_call, some_calls, strict_arguments
from engine.errors import RequestError
from engine.frontend.structured_outputs import StructuredOutputs

TOOL_CHOICES = ("none", "auto", "required")
FORM = '{"type": "function", "function": {"name": …, "parameters": {…}}}'

Schema = dict[str, Any]


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The tools that the model may call.

    Attributes:
        tools: schemas of their parameters, by name; empty: no calls.
        strict: names of those whose arguments must conform to the schema.
        enforced: the model must call a tool, and writes nothing else.
        named: the tool that it must call; empty: any.
        parallel: whether it may call several.
    """

    tools: dict[str, Schema]
    strict: frozenset[str] = frozenset()
    enforced: bool = False
    named: str = ""
    parallel: bool = True

    def structured_outputs(self, form: str) -> StructuredOutputs | None:
        """What the output must conform to; None: nothing.

        `form` is that of the model's calls. Raises RequestError if arguments can't be constrained in this form.
        """
        if self.named:
            return one_call(self.tools[self.named])
        if self.enforced:
            return some_calls(self.tools, parallel=self.parallel)
        if not self.strict:
            return None
        if form != "hermes":
            raise RequestError(
                f"strict: calls in the form {form} can be constrained only if tool_choice enforces a call; leave "
                "strict out, and check the arguments",
                "tools",
            )
        return strict_arguments(self.tools, self.strict)


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


def choose_tools(tools: Sequence[dict[str, Any]] | None, choice: Any, *, parallel: bool = True) -> ToolChoice:
    """The tools that the model may call.

    Args:
        tools: of the request.
        choice: its `tool_choice`; None is auto if there are tools.
        parallel: whether it may call several.

    Raises:
        RequestError: with the field that is not valid.
    """
    known = check_tools(tools)
    if choice is None:
        choice = "auto" if known else "none"
    named = choice.get("function") if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if choice not in TOOL_CHOICES and not isinstance(name, str):
        raise RequestError('tool_choice must be "none", "auto", "required" or name a function', "tool_choice")
    if choice == "none":
        return ToolChoice(tools={})
    if not known:
        raise RequestError("tool_choice needs tools", "tool_choice")
    if isinstance(name, str) and name not in known:
        raise RequestError(f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
    strict = frozenset(tool["function"]["name"] for tool in tools or () if tool["function"].get("strict"))
    return ToolChoice(tools=known, strict=strict, enforced=choice != "auto", named=name or "", parallel=parallel)
