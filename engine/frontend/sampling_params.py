"""SamplingParams: the sampling parameters of one request, checked and turned into messages for the core."""

from typing import Any

import msgspec

from engine.columns import column
from engine.errors import RequestError
from engine.frontend.prompts import Prompt
from engine.frontend.structured_outputs import StructuredOutputs
from engine.frontend.token_filters import check_any_token_left
from engine.frontend.tokenizer import Tokenizer
from engine.messages import AddRequest, Sampling, TextOptions
from engine.reasoning import ReasoningBudget

MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_BAD_WORDS = 1024  # each is searched for at each token
MAX_STOP_TOKEN_IDS = 1024  # each is sent with the request and checked at each token
MAX_LOGIT_BIAS = 1024  # each is added at each token
SEED_MASK = (1 << 64) - 1


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How to continue one prompt. A value that is out of range raises RequestError.

    Attributes:
        n: number of independent outputs.
        temperature: 0 to 2; 0 is greedy.
        top_p: 0 to 1.
        top_k: 0 or -1: no limit.
        min_p: 0 to 1.
        seed: any integer; None: a seed is drawn.
        max_tokens: None: as many as fit.
        min_tokens: until then, end-of-sequence ids and stop ids are not sampled, and stop strings do not count.
        stop: strings that end the text.
        stop_token_ids: token ids that end the text.
        ignore_eos: end-of-sequence ids do not end the text.
        logprobs: number of most likely tokens whose logprobs are returned with each sampled token.
        prompt_logprobs: the same for each prompt token but the first. Disables reading the prefix cache.
        presence_penalty: -2 to 2, as in OpenAI's API.
        frequency_penalty: -2 to 2, as in OpenAI's API.
        repetition_penalty: as in transformers; 1 has no effect.
        logit_bias: token ids to values added to their logits, -100 to 100.
        bad_words: words that are not generated (see `bad_word_ids`).
        allowed_token_ids: only these tokens are generated.
        truncate_prompt_tokens: number of prompt tokens to keep; -1: --max-model-len minus max_tokens.
        truncation_side: "right" keeps the beginning of the prompt; otherwise its end is kept.
        skip_special_tokens: leave special tokens out of the text.
        visible_special_ids: special tokens that stay in the text all the same.
        include_stop_str_in_output: leave the stop string in the text.
        structured_outputs: what the text must conform to.
        thinking_token_budget: number of tokens of reasoning after which its end is written. Of chats, and of `LLM`.
        reasoning: how the budget is enforced, set with the prompt (see `engine.frontend.thinking_budget`).
        use_beam_search: the `n` most likely outputs instead of sampled ones (see `engine.frontend.beam_search`).
        length_penalty: of beam search: outputs are ordered by the sum of their logprobs divided by their length to this
            power.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    skip_special_tokens: bool = True
    visible_special_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: int | None = None
    reasoning: ReasoningBudget | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and low <= value <= high):
                raise RequestError(f"{name} must lie in {low}..{high}, not {value!r}", name)
            if name in INTEGERS and not isinstance(value, int | None):
                raise RequestError(f"{name} must be an integer, not {value!r}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens: {self.max_tokens}", "min_tokens"
            )
        stops = self.stops
        if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError(f"stop must have at most {MAX_STOPS} strings, none of them empty", "stop")
        if len(self.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids must have at most {MAX_STOP_TOKEN_IDS} ids, not {len(self.stop_token_ids or ())}",
                "stop_token_ids",
            )
        self._check_filters()
        if self.length_penalty != 1 and not self.use_beam_search:
            raise RequestError("length_penalty needs use_beam_search: true", "length_penalty")
        if len(self.logit_bias or ()) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias must have at most {MAX_LOGIT_BIAS} tokens, not {len(self.logit_bias or ())}", "logit_bias"
            )
        for token, bias in (self.logit_bias or {}).items():
            if not -100 <= bias <= 100:
                raise RequestError(f"logit_bias must lie in -100..100, not {bias!r} (of token {token})", "logit_bias")

    def _check_filters(self) -> None:
        words = self.bad_words or []
        if len(words) > MAX_BAD_WORDS or not all(isinstance(word, str) and word.strip() for word in words):
            raise RequestError(f"bad_words must have at most {MAX_BAD_WORDS} words, none of them empty", "bad_words")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty: nothing could be generated", "allowed_token_ids")
        if self.truncate_prompt_tokens == 0:
            raise RequestError("truncate_prompt_tokens must be -1 or at least 1, not 0", "truncate_prompt_tokens")
        if self.truncation_side not in (None, "left", "right"):
            raise RequestError(
                f"truncation_side must be 'left' or 'right', not {self.truncation_side!r}", "truncation_side"
            )

    @property
    def needs_prompt_ids(self) -> bool:
        """Whether the front end must tokenize the prompt even if the core tokenizes texts."""
        return self.truncate_prompt_tokens is not None or self.prompt_logprobs is not None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError for token ids that are not in the vocabulary."""
        for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                if not 0 <= token < vocab_size:
                    raise RequestError(f"{name}: {token} is not in the vocabulary (0..{vocab_size - 1})", name)


INTEGERS = frozenset({
    "n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens",
    "thinking_token_budget",
})  # fmt: skip
# name, smallest, largest
RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, 128),
    ("temperature", 0, 2),
    ("top_p", 0, 1),
    ("top_k", -1, 2**31 - 1),
    ("min_p", 0, 1),
    ("seed", -(2**63), 2**64 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("truncate_prompt_tokens", -1, 2**31 - 1),
    ("thinking_token_budget", 0, 2**31 - 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 1e-3, 100),
    ("length_penalty", -10, 10),
)


def _stop_ids(params: SamplingParams, tokenizer: Tokenizer) -> tuple[int, ...]:
    end_ids = () if params.ignore_eos else tokenizer.eos_ids
    return tuple(dict.fromkeys((*end_ids, *(params.stop_token_ids or ()))))


def make_request(
    handle: int,
    prompt: Prompt,
    params: SamplingParams,
    tokenizer: Tokenizer,
    seed: int,
    tokens_left: int,
    *,
    bad_words: tuple[tuple[int, ...], ...] = (),
    inline: bool = False,
    **extra: Any,
) -> AddRequest:
    """Build the core's message for one output. Raises RequestError if no token could be generated.

    Args:
        tokens_left: number of tokens that fit after the prompt.
        bad_words: token sequences that are not generated.
        inline: whether the core detokenizes.
        extra: further fields of AddRequest.
    """
    if inline:
        extra["text_options"] = TextOptions(
            params.stops, params.include_stop_str_in_output, params.skip_special_tokens, params.visible_special_ids
        )
    if isinstance(prompt, list):
        packed = column(prompt)
    else:
        packed = b""
        extra |= {"text": prompt.text, "add_special_tokens": prompt.add_special_tokens}
    stop_ids = _stop_ids(params, tokenizer)
    max_tokens = tokens_left if params.max_tokens is None else min(params.max_tokens, tokens_left)
    min_tokens = min(params.min_tokens, max_tokens)
    sampling = Sampling(
        temperature=float(params.temperature),
        top_p=float(params.top_p),
        top_k=max(params.top_k, 0),
        min_p=float(params.min_p),
        seed=seed & SEED_MASK,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        min_tokens=min_tokens,
        stop_ids=stop_ids if min_tokens else (),
        presence_penalty=float(params.presence_penalty),
        frequency_penalty=float(params.frequency_penalty),
        repetition_penalty=float(params.repetition_penalty),
        logit_bias=tuple((int(token), float(bias)) for token, bias in (params.logit_bias or {}).items()),
        allowed=column(params.allowed_token_ids or ()),
        bad_words=bad_words,
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
    )
    check_any_token_left(sampling)
    return AddRequest(
        handle=handle,
        prompt=packed,
        max_tokens=max_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        min_tokens=min_tokens,
        grammar=None if params.structured_outputs is None else params.structured_outputs.to_grammar(),
        reasoning=params.reasoning,
        **extra,
    )
