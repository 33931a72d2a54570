"""The body of /v1/chat/completions, and its options for the chat template."""

from typing import Any

import msgspec

from engine.api.protocol import SampledRequest
from engine.errors import RequestError
from engine.frontend.sampling_params import MAX_LOGPROBS

# Arguments of a template that are fields of the request, or that clients must not set.
OWN_ARGUMENTS = frozenset({
    "messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "padding", "truncation", "max_length", "template", "extra",
})  # fmt: skip


class ChatRequest(SampledRequest, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    return_prompt_text: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    thinking_token_budget: int | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None

    def check(self) -> None:
        """Raise RequestError, with the field, for what is not supported yet or not valid."""
        self.check_common()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            raise RequestError(f"top_logprobs must lie in 0..{MAX_LOGPROBS}, not {self.top_logprobs}", "top_logprobs")
        if self.max_completion_tokens is not None:
            name, value = "max_completion_tokens", self.max_completion_tokens
            if not 1 <= value < 2**31:
                raise RequestError(f"{name} must lie in 1..2^31 - 1, not {value}", name)
            if self.max_tokens not in (None, value):
                raise RequestError(
                    f"{name} is {value}, but max_tokens is {self.max_tokens}: give only one of them", name
                )


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Tokenize a prompt or messages; the fields mean the same as in completions and chats."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


def template_options(body: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """The options of a conversation, as arguments of `Tokenizer.render_chat`."""
    extra = dict(body.chat_template_kwargs or {})
    for name in extra:
        if name in OWN_ARGUMENTS:
            field = f"chat_template_kwargs.{name}"
            raise RequestError(f"{field} is a field of the request, not a variable of the template", field)
    options: dict[str, Any] = {"add_generation_prompt": body.add_generation_prompt is not False}
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
    given = {"tools": body.tools, "documents": body.documents, "template": body.chat_template, "extra": extra}
    return options | {name: value for name, value in given.items() if value}
