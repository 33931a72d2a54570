"""The body of /v1/chat/completions, and its messages."""

from typing import Any

import msgspec

from engine.api.protocol import SampledRequest
from engine.errors import RequestError
from engine.frontend.sampling import MAX_LOGPROBS


class ResponseFormat(msgspec.Struct):
    type: str


class ChatRequest(SampledRequest, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse what isn't served yet, by name."""
        self.check_common()
        if self.tools:
            raise RequestError("tools are not supported yet", "tools")
        if self.response_format is not None and self.response_format.type != "text":
            raise RequestError(
                f"response_format {self.response_format.type!r} is not supported yet: only 'text' is", "response_format"
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            raise RequestError(f"top_logprobs must lie in 0..{MAX_LOGPROBS}, not {self.top_logprobs}", "top_logprobs")
        if self.max_completion_tokens is not None:
            name, value = "max_completion_tokens", self.max_completion_tokens
            if not 1 <= value < 2**31:
                raise RequestError(f"{name} must lie in 1..2^31 - 1, not {value}", name)
            if self.max_tokens not in (None, value):
                raise RequestError(f"{name} is {value}, but max_tokens is {self.max_tokens}: give one of them", name)
        if not self.messages:
            raise RequestError("messages is an empty list", "messages")

    def conversation(self) -> list[dict[str, Any]]:
        """The messages with their contents as plain text, which is what a template of a text model takes."""
        return [
            {**message, "content": text_of(message.get("content"), number)}
            for number, message in enumerate(self.messages)
            if check_role(message, number)
        ]


def check_role(message: dict[str, Any], number: int) -> bool:
    if not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{number}].role must be a string", f"messages[{number}].role")
    return True


def text_of(content: Any, number: int) -> str:
    """The text of a message's content: a string, or a list of text parts."""
    field = f"messages[{number}].content"
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{field} must be a string or a list of parts", field)
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"{field} holds a part of type {kind!r}: this model takes text parts only", field)
        texts.append(part["text"])
    return "\n".join(texts)
