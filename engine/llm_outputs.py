"""What `LLM` returns."""

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None  # 1 for the most likely token
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One output of a prompt. `logprobs` has, per token, a map of token id to Logprob with the sampled token first."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request in seconds since it was submitted, with all its outputs."""

    first_token_s: float
    end_s: float


@dataclass(slots=True)
class RequestOutput:
    """The outputs of one prompt.

    `prompt` is None if token ids were given; `prompt_token_ids` are those after truncation. `prompt_logprobs` has None
    for the first token.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """The embedding of one text; `prompt_token_ids` are those after truncation."""

    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass(slots=True)
class ScoringOutput:
    score: float


@dataclass(slots=True)
class ScoringRequestOutput:
    """The score of one pair. Of a model that embeds, `prompt_token_ids` are those of both texts."""

    outputs: ScoringOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
