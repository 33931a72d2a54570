"""The body of /v1/responses, and the chat that it means."""

import re
from typing import Any

import msgspec

from engine.api.chat_protocol import ChatRequest
from engine.api.structured_fields import JsonSchema, ResponseFormat
from engine.errors import RequestError
from engine.frontend.structured_outputs import OutputForm

MAX_METADATA = 16  # entries, as in OpenAI's API
LONGEST_METADATA = {"key": 64, "value": 512}  # characters
FORMATS = ("text", "json_object", "json_schema")
CHOICES = ("none", "auto", "required")
LOGPROBS = "message.output_text.logprobs"  # of `include`
# What else a response may contain. None of it is left out here: reasoning and images are shown as they are, and
# there are no built-in tools.
WITHOUT_EFFECT = frozenset({
    "reasoning.encrypted_content", "message.input_image.image_url", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
})  # fmt: skip


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` changes nothing: a schema is always enforced."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None

    def response_format(self) -> ResponseFormat:
        """The same in the form of chats."""
        if self.type not in FORMATS:
            raise RequestError(
                f"text.format.type must be one of {', '.join(FORMATS)}, not {self.type!r}", "text.format"
            )
        schema = JsonSchema(self.schema, self.name, self.description, self.strict)
        return ResponseFormat(self.type, schema if self.type == "json_schema" else None)


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesStreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None
    include_usage: bool | None = None  # of chats, no effect: the last event has the usage in any case; AIPerf sends it


class ResponsesRequest(msgspec.Struct, kw_only=True):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    user: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    # the fields of chats that OpenAI's responses do not have
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    structured_outputs: OutputForm | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int | None = None

    @property
    def text_format(self) -> TextFormat:
        return (self.text and self.text.format) or TextFormat("text")

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def check(self) -> None:
        """Raise RequestError, with the field, for values that are not valid or not supported."""
        check_metadata(self.metadata or {})
        if self.max_output_tokens is not None and not 1 <= self.max_output_tokens < 2**31:
            name = "max_output_tokens"
            raise RequestError(f"{name} must lie in 1..2^31 - 1, not {self.max_output_tokens}", name)
        if self.truncation not in (None, "auto", "disabled"):
            raise RequestError(f'truncation must be "auto" or "disabled", not {self.truncation!r}', "truncation")
        for name in self.include or ():
            if name != LOGPROBS and name not in WITHOUT_EFFECT:
                raise RequestError(f"include: {name!r} is not supported", "include")
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise RequestError("text.verbosity is not supported", "text.verbosity")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            name = "stream_options.include_obfuscation"
            raise RequestError(f"{name} is not supported", name)
        reasoning = self.reasoning or ReasoningOptions()
        for name, summary in (("summary", reasoning.summary), ("generate_summary", reasoning.generate_summary)):
            if summary not in (None, "auto"):
                name = f"reasoning.{name}"
                raise RequestError(f"{name}: there are no summaries, reasoning is shown as it is", name)

    def chat(self, messages: list[dict[str, Any]]) -> ChatRequest:
        """The chat with these messages that answers the request."""
        return ChatRequest(
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            tools=[chat_tool(tool, number) for number, tool in enumerate(self.tools or ())] or None,
            tool_choice=chat_choice(self.tool_choice),
            response_format=self.text_format.response_format(),
            reasoning_effort=None if self.reasoning is None else self.reasoning.effort,
            logprobs=self.wants_logprobs,
            truncate_prompt_tokens=-1 if self.truncation == "auto" else None,
            **{name: getattr(self, name) for name in SHARED},
        )


# Fields with the same name and meaning in both bodies.
SHARED = tuple(
    name
    for name in ResponsesRequest.__struct_fields__
    if name in ChatRequest.__struct_fields__ and name not in ("tools", "tool_choice", "stream", "stream_options")
)


def check_metadata(metadata: dict[str, str]) -> None:
    """Raise RequestError for metadata beyond the limits of OpenAI's API."""
    if len(metadata) > MAX_METADATA:
        raise RequestError(f"metadata has {len(metadata)} entries, but at most {MAX_METADATA} are allowed", "metadata")
    for entry in metadata.items():
        for (what, most), text in zip(LONGEST_METADATA.items(), entry, strict=True):
            if len(text) > most:
                raise RequestError(f"metadata: a {what} has {len(text):,} characters, at most {most}", "metadata")


def chat_tool(tool: dict[str, Any], number: int) -> dict[str, Any]:
    """A tool in the form of chats. Raises RequestError for one that is not a function."""
    if tool.get("type") != "function":
        raise RequestError(
            f"tools[{number}].type {tool.get('type')!r} is not supported: only function tools are", f"tools[{number}]"
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """A `tool_choice` in the form of chats."""
    if choice is None or isinstance(choice, str):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise RequestError(
            f"tool_choice of type {choice.get('type')!r} is not supported: use {', '.join(CHOICES)}, or "
            '{"type": "function", "name": …}',
            "tool_choice",
        )
    return {"type": "function", "function": {"name": choice["name"]}}


# Names of chats, and the same in this API.
NAMES = (
    (re.compile(r"\bresponse_format\.json_schema\.schema\b"), "text.format.schema"),
    (re.compile(r"\bresponse_format\b"), "text.format"),
    (re.compile(r"\bmax_(completion_)?tokens\b"), "max_output_tokens"),
    (re.compile(r"\btruncate_prompt_tokens\b"), "truncation"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"\b(tools\[\d+\])\.function\b"), r"\1"),
)
PLACE = re.compile(r"\bmessages\[(\d+)\]")


def renamed(text: str, places: list[str]) -> str:
    """A message or field of an error of the chat, with the names of this API; `places` are those of its messages."""
    for pattern, name in NAMES:
        text = pattern.sub(name, text)
    text = PLACE.sub(lambda match: places[int(match[1])], text)
    return re.sub(r"\bmessages\b(?=$| has | is )", "input", text)
