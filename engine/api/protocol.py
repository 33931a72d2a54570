"""The OpenAI-compatible request bodies: decoded by msgspec, so that a wrong type is refused with its field's name.

Fields that aren't listed are ignored, as such servers do.
"""

import re
from typing import Any, TypeVar

import msgspec

from engine.errors import RequestError
from engine.frontend.sampling import MAX_LOGPROBS, SamplingParams


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Sampled(msgspec.Struct, kw_only=True):
    """What completions and chats have in common."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    user: str | None = None

    def sampling_params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        given = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            try:
                given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
            except ValueError as error:
                raise RequestError("logit_bias must map token ids to numbers", "logit_bias") from error
        return SamplingParams(**given, max_tokens=max_tokens, logprobs=logprobs)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


# Fields that mean the same in a body and in SamplingParams.
SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


class CompletionRequest(_Sampled, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """Refuse what isn't served yet, by name."""
        if self.suffix:
            raise RequestError("suffix is not supported", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of other than n is not supported", "best_of")
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo together with logprobs is not supported yet: it asks for those of the prompt", "echo"
            )

    def prompts(self) -> list[str | list[int]]:
        """The prompts as texts or token ids, whichever of the four forms they came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("prompt is an empty list", "prompt")
        kinds = {type(part) for part in self.prompt}
        if kinds == {int}:
            return [list(self.prompt)]  # type: ignore[arg-type]
        if len(kinds) > 1:
            raise RequestError("prompt mixes texts and token ids in one list", "prompt")
        return list(self.prompt)  # type: ignore[arg-type]


class ResponseFormat(msgspec.Struct):
    type: str


class ChatRequest(_Sampled, kw_only=True):
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
        if self.tools:
            raise RequestError("tools are not supported yet", "tools")
        if self.response_format is not None and self.response_format.type != "text":
            raise RequestError(
                f"response_format {self.response_format.type!r} is not supported yet: only 'text' is", "response_format"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        if not 0 <= (self.top_logprobs or 0) <= MAX_LOGPROBS:
            raise RequestError(f"top_logprobs must lie in 0..{MAX_LOGPROBS}, not {self.top_logprobs}", "top_logprobs")
        if self.max_completion_tokens is not None and self.max_completion_tokens < 1:
            name = "max_completion_tokens"
            raise RequestError(f"{name} must be at least 1, not {self.max_completion_tokens}", name)
        if not self.messages:
            raise RequestError("messages is an empty list", "messages")

    def conversation(self) -> list[dict[str, Any]]:
        """The messages with their contents as plain text, which is what a template of a text model takes."""
        return [
            {**message, "content": text_of(message.get("content"), number)}
            for number, message in enumerate(self.messages)
            if check_role(message, number)
        ]


class TokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


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


Body = TypeVar("Body", bound=msgspec.Struct)

_decoders: dict[type, msgspec.json.Decoder[Any]] = {}
_place = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<field>.*)`)?$", re.DOTALL)


def parse(data: bytes, kind: type[Body]) -> Body:
    """Decode a request body; RequestError names the field that can't be read."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        body: Body = decoder.decode(data)
    except msgspec.ValidationError as error:
        match = _place.match(str(error))
        assert match is not None
        what, field = match["what"], match["field"]
        if missing := re.fullmatch(r"Object missing required field `(\w+)`", what):
            field = f"{field}.{missing[1]}" if field else missing[1]
            raise RequestError(f"{field} is missing", field) from error
        what = what[:1].lower() + what[1:]
        raise RequestError(f"{field}: {what}" if field else f"the body: {what}", field or None) from error
    except msgspec.DecodeError as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    return body
