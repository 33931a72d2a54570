"""A request of Anthropic's API as a chat: the same prompt, parameters and parsers of the output."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from engine.api.chat_protocol import ChatRequest, TokenizeRequest
from engine.api.messages.conversation import ChatMessages, Object, check_fields
from engine.api.messages.protocol import CountTokensRequest, MessagesRequest
from engine.api.structured_fields import JsonSchema, ResponseFormat
from engine.errors import NotServedError, RequestError
from engine.frontend.answer_format import AnswerFormat
from engine.frontend.tokenizer import Tokenizer

CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # of tool_choice, and what they are in chats
TOOL = "tool"  # the choice of one tool
SWITCHES = ("enable_thinking", "thinking")  # variables by which chat templates switch reasoning on and off
# Names of fields in errors of chats, and what they are called here.
RENAMED = (
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"\breasoning_effort\b"), "output_config.effort"),
    (re.compile(r"\bthinking_token_budget\b"), "thinking.budget_tokens"),
    (re.compile(r"\bresponse_format(\.json_schema(\.schema)?)?"), "output_config.format"),
    (re.compile(r"\bcontinue_final_message\b"), "messages"),
    (re.compile(r"\b(tools\[\d+\])\.function\.parameters\b"), r"\1.input_schema"),
    (re.compile(r"\b(tools\[\d+\])\.function\b"), r"\1"),
)


class MessagesChat:
    """A request as a chat."""

    def __init__(self, body: CountTokensRequest, answers: AnswerFormat, tokenizer: Tokenizer):
        """Args:
            body: of the request.
            answers: the forms of reasoning and calls of the model.
            tokenizer: its tokenizer.

        Raises:
            RequestError: with the field, for what is not valid or not supported.
        """
        self._conversation = ChatMessages(body.system, body.messages)
        self.messages = self._conversation.messages
        self._prompt: dict[str, Any] = {"messages": self.messages, "model": body.model or None}
        if body.tools:
            self._prompt["tools"] = [_tool(tool, f"tools[{number}]") for number, tool in enumerate(body.tools)]
        if body.tool_choice is not None:
            self._prompt["tool_choice"] = _tool_choice(body.tool_choice)
        if body.thinking is not None:
            thinks = _thinks(body.thinking)
            if thinks and body.tool_choice is not None and body.tool_choice["type"] in ("any", TOOL):
                raise RequestError("tool_choice: a model that must call a tool writes no thoughts", "tool_choice")
            self._prompt["chat_template_kwargs"] = _switches(thinks, answers, tokenizer)
        if body.output_config:
            check_fields(body.output_config, "output_config", {}, {"effort": str, "format": dict})
            self._prompt["reasoning_effort"] = body.output_config.get("effort")
        if self._conversation.is_continued:
            if "tool_calls" in self.messages[-1]:
                raise RequestError("messages: the last message has a tool_use; send its tool_result too", "messages")
            self._prompt["continue_final_message"] = True

    def chat_request(self, body: MessagesRequest) -> ChatRequest:
        """The body of the chat. Raises RequestError, with the field, for what is not valid or not supported."""
        choice, thinking = body.tool_choice or {}, body.thinking or {}
        budget = thinking.get("budget_tokens")
        if budget is not None and budget >= body.max_tokens:
            budget = None  # max_tokens ends the thoughts before
        return ChatRequest(
            **self._prompt,
            response_format=_output_format(body.output_config or {}),
            max_tokens=body.max_tokens,
            stop=body.stop_sequences or None,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            stream=body.stream,
            include_reasoning=thinking.get("display") != "omitted",
            thinking_token_budget=budget,
            parallel_tool_calls=False if choice.get("disable_parallel_tool_use") else None,
        )

    def tokenize_request(self) -> TokenizeRequest:
        """The body that counts the prompt of the chat."""
        return TokenizeRequest(**self._prompt)

    @contextlib.contextmanager
    def named_here(self) -> Iterator[None]:
        """Errors of the chat name the fields of this request."""
        try:
            yield
        except NotServedError:
            raise
        except RequestError as error:
            message, field = str(error), error.field
            if field and field.partition("[")[0] not in message:
                message = f"{field}: {message}"
            raise type(error)(self._renamed(message), field and self._renamed(field)) from error

    def _renamed(self, text: str) -> str:
        text = self._conversation.restore_places(text)
        for name, instead in RENAMED:
            text = name.sub(instead, text)
        return text


def _tool(tool: Any, field: str) -> Object:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind not in (None, "custom"):
        raise RequestError(
            f"{field}.type {kind!r} is not supported: this server runs no tools itself, so describe it by name and "
            "input_schema, without a type",
            f"{field}.type",
        )
    optional = {"type": str, "description": str, "strict": bool, "eager_input_streaming": bool}
    check_fields(tool, field, {"name": str, "input_schema": dict}, optional)
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    function |= {name: tool[name] for name in ("description", "strict") if tool.get(name)}
    return {"type": "function", "function": function}


def _tool_choice(choice: Object) -> str | Object:
    kind = choice.get("type")
    if kind not in (*CHOICES, TOOL):
        raise RequestError(f"tool_choice.type must be {', '.join(CHOICES)} or tool, not {kind!r}", "tool_choice.type")
    required: dict[str, type] = {"type": str, "name": str} if kind == TOOL else {"type": str}
    check_fields(choice, "tool_choice", required, {"disable_parallel_tool_use": bool})
    return {"type": "function", "function": {"name": choice["name"]}} if kind == TOOL else CHOICES[kind]


def _thinks(thinking: Object) -> bool:
    """Whether the model shall think before it answers."""
    kind = thinking.get("type")
    if kind not in ("adaptive", "enabled", "disabled"):
        raise RequestError(f"thinking.type must be adaptive, enabled or disabled, not {kind!r}", "thinking.type")
    optional = {} if kind == "disabled" else {"display": str, "budget_tokens": int}
    check_fields(thinking, "thinking", {"type": str}, optional)
    if thinking.get("display") not in (None, "summarized", "omitted"):
        raise RequestError("thinking.display must be summarized or omitted", "thinking.display")
    return bool(kind != "disabled")


def _switches(thinks: bool, answers: AnswerFormat, tokenizer: Tokenizer) -> dict[str, Any]:
    """The variables of the chat template by which the model thinks, or not.

    Raises RequestError if it has no thoughts that can be told from the answer, or can't be kept from thinking.
    """
    known = () if tokenizer.template is None else tokenizer.template.variables
    found = dict.fromkeys((name for name in SWITCHES if name in known), thinks)
    reasons = answers.parses(tools=False, reasoning=True)
    if thinks and not reasons:
        raise RequestError(
            "thinking: the form of this model's thoughts is unknown, or it has none (--reasoning-parser)", "thinking"
        )
    if not thinks and reasons and not found:
        raise RequestError(
            "thinking.type 'disabled' is not supported: the model's chat template can't switch thoughts off",
            "thinking.type",
        )
    return found


def _output_format(config: Object) -> ResponseFormat | None:
    """The form of the output."""
    form = config.get("format")
    if form is None:
        return None
    field = "output_config.format"
    check_fields(form, field, {"type": str, "schema": dict}, {})
    if form["type"] != "json_schema":
        raise RequestError(f"{field}.type must be json_schema, not {form['type']!r}", f"{field}.type")
    return ResponseFormat("json_schema", JsonSchema(form["schema"]))
