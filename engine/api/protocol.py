"""The request bodies of completions and detokenize, and the fields that chats share (see `chat_protocol`)."""

import re
from collections.abc import Mapping

import msgspec

from engine.api.common_fields import check_bookkeeping, split_prompts
from engine.api.structured_fields import ConstrainedRequest
from engine.errors import RequestError
from engine.frontend.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's
LONGEST_ID = 512  # characters; the id is part of the response and of each chunk of a stream

replace = msgspec.structs.replace


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# A token id as a key of an object. Whether it is in the vocabulary is checked later.
_token_id = re.compile(r"-?[0-9]{1,18}", re.ASCII)


class SampledRequest(ConstrainedRequest, kw_only=True):
    """The fields that completions and chats have in common."""

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
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = None
    user: str | None = None

    def sampling_params(self, defaults: Mapping[str, int | float], **more: int | None) -> SamplingParams:
        """The SamplingParams of the body, over the server's defaults; `more`: fields with another name in the body."""
        given = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            if not all(_token_id.fullmatch(token) for token in self.logit_bias):
                raise RequestError("logit_bias must map token ids to numbers", "logit_bias")
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        given |= {name: value for name, value in more.items() if value is not None}
        given["structured_outputs"] = self.wanted_outputs()
        return SamplingParams(**{"max_tokens": None, **defaults, **given})

    def check_common(self) -> None:
        """Raise RequestError for fields that contradict each other or are out of range."""
        options = self.stream_options
        if not self.stream and options is not None and options != StreamOptions():
            raise RequestError("stream_options needs stream: true", "stream_options")
        if self.use_beam_search and self.stream:
            raise RequestError("use_beam_search needs stream: false: the beams are known at the end", "use_beam_search")
        check_bookkeeping(self)


# Fields with the same name and meaning in a body and in SamplingParams.
SAMPLING_FIELDS = tuple(
    name
    for name in SampledRequest.__struct_fields__
    if name in SamplingParams.__struct_fields__ and name not in ("max_tokens", "logit_bias", "structured_outputs")
)


class CompletionRequest(SampledRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | bool | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    @property
    def top_logprobs(self) -> int | None:
        """The number of alternatives per token; None: no logprobs. As in chats, `false` is none, and `true` is one."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)

    @property
    def echo_only(self) -> bool:
        """Whether only the prompt is returned; the one token that is generated is not."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self, defaults: Mapping[str, int | float]) -> SamplingParams:
        """The SamplingParams; an echo with logprobs includes those of the prompt."""
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        found = self.sampling_params(defaults, max_tokens=max_tokens or int(self.echo_only), logprobs=self.top_logprobs)
        if (self.best_of or 0) > found.n:
            assert self.best_of is not None
            found = replace(found, n=self.best_of, logprobs=found.logprobs or 0)
        if not self.echo or self.top_logprobs is None:
            return found
        return replace(found, prompt_logprobs=max(self.top_logprobs, self.prompt_logprobs or 0))

    def check(self) -> None:
        """Raise RequestError, with the field, for what is not supported."""
        self.check_common()
        if self.suffix:
            raise RequestError("suffix is not supported", "suffix")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise RequestError(f"best_of must be at least n, {self.n or 1}, not {self.best_of}", "best_of")
        if self.stream and (self.best_of or 0) > (self.n or 1):
            raise RequestError("best_of needs stream: false: the best output is known at the end", "best_of")
        if self.use_beam_search and (self.best_of or 0) > (self.n or 1):
            raise RequestError("best_of can't be used with use_beam_search: n is the number of beams", "best_of")

    def prompts(self) -> list[str | list[int]]:
        """The prompts as texts or token ids, from any of the four forms."""
        return split_prompts(self.prompt, "prompt")


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None
