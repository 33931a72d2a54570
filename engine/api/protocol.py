"""The OpenAI-compatible request bodies, chats apart (`chat_protocol`): what clients may send, and what is refused."""

import re
from collections.abc import Mapping

import msgspec

from engine.errors import RequestError
from engine.frontend.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 16  # of completions, as OpenAI's

replace = msgspec.structs.replace


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


# A token id in a key; no id has more digits. What is no token of the model is refused where its vocabulary is known.
_token_id = re.compile(r"-?[0-9]{1,18}", re.ASCII)


class SampledRequest(msgspec.Struct, kw_only=True):
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
    user: str | None = None

    def sampling_params(self, defaults: Mapping[str, int | float], **more: int | None) -> SamplingParams:
        """What the body says, over the server's defaults; `more` are fields that it says in its own way."""
        given = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            if not all(_token_id.fullmatch(token) for token in self.logit_bias):
                raise RequestError("logit_bias must map token ids to numbers", "logit_bias")
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        given |= {name: value for name, value in more.items() if value is not None}
        return SamplingParams(**{"max_tokens": None, **defaults, **given})

    def check_common(self) -> None:
        """Refuse fields that contradict each other, or can't hold on any server."""
        options = self.stream_options
        if not self.stream and options is not None and options != StreamOptions():
            raise RequestError("stream_options needs stream: true", "stream_options")
        if self.priority is not None and not -(2**31) <= self.priority < 2**31:
            raise RequestError(f"priority must lie in -2^31..2^31 - 1, not {self.priority:.3g}", "priority")


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
    "bad_words",
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "truncation_side",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
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
        """How many alternatives a token has; `false` is what chats say for none, `true` for one."""
        return None if self.logprobs is None or self.logprobs is False else int(self.logprobs)

    @property
    def echo_only(self) -> bool:
        """Whether the prompt alone is asked for: the one token that is generated isn't shown."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self, defaults: Mapping[str, int | float]) -> SamplingParams:
        """How to continue the prompts; an echo has the logprobs of the prompt too."""
        max_tokens = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        found = self.sampling_params(defaults, max_tokens=max_tokens or int(self.echo_only), logprobs=self.top_logprobs)
        if not self.echo or self.top_logprobs is None:
            return found
        return replace(found, prompt_logprobs=max(self.top_logprobs, self.prompt_logprobs or 0))

    def check(self) -> None:
        """Refuse what isn't served yet, by name."""
        self.check_common()
        if self.suffix:
            raise RequestError("suffix is not supported", "suffix")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of other than n is not supported", "best_of")

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


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None
