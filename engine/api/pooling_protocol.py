"""The request bodies of embeddings, scores and rerankings."""

import msgspec

from engine.api.common_fields import check_bookkeeping
from engine.errors import RequestError

ENCODING_FORMATS = ("float", "base64")


class PoolingRequest(msgspec.Struct, kw_only=True):
    """The fields that all requests to a model that pools have in common."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = None
    user: str | None = None

    def keep(self, max_model_len: int) -> int | None:
        """How many tokens of a prompt to keep, None for all. Raises RequestError if a field is out of range."""
        check_bookkeeping(self)
        keep, side = self.truncate_prompt_tokens, self.truncation_side
        if side not in (None, "left", "right"):
            raise RequestError(f"truncation_side must be 'left' or 'right', not {side!r}", "truncation_side")
        if keep is None or keep == -1:
            return None if keep is None else max_model_len
        if not 1 <= keep <= max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens must be -1 or lie in 1..{max_model_len} (--max-model-len), not {keep}",
                "truncate_prompt_tokens",
            )
        return keep


class EmbeddingRequest(PoolingRequest, kw_only=True):
    input: str | list[str | int | list[int]]
    encoding_format: str | None = None
    dimensions: int | None = None
    add_special_tokens: bool | None = None
    normalize: bool | None = None

    @property
    def as_base64(self) -> bool:
        """Whether embeddings are written as base64. Raises RequestError for another format."""
        chosen = self.encoding_format or ENCODING_FORMATS[0]
        if chosen not in ENCODING_FORMATS:
            raise RequestError(
                f"encoding_format must be one of {', '.join(ENCODING_FORMATS)}, not {chosen!r}", "encoding_format"
            )
        return chosen == "base64"


class ScoreRequest(PoolingRequest, kw_only=True):
    text_1: str | list[str]
    text_2: str | list[str]

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of texts: the first one with each, or as many on both sides. Raises RequestError."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        for name, texts in (("text_1", first), ("text_2", second)):
            if not texts:
                raise RequestError(f"{name} is an empty list", name)
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise RequestError(
                f"text_1 has {len(first)} texts and text_2 {len(second)}: give one text_1, or as many of both", "text_2"
            )
        return list(zip(first, second, strict=True))


class RerankRequest(PoolingRequest, kw_only=True):
    query: str
    documents: list[str]
    top_n: int | None = None
    return_documents: bool | None = None

    def most_results(self) -> int:
        """How many results to return. Raises RequestError if there is none, or for a number that is out of range."""
        if not self.documents:
            raise RequestError("documents is an empty list", "documents")
        if self.top_n is not None and self.top_n < 0:
            raise RequestError(f"top_n must be at least 1, or 0 for all, not {self.top_n}", "top_n")
        return self.top_n or len(self.documents)
