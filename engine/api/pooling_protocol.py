"""The request bodies of models that pool: embeddings, scores, rerankings, classes and pooled vectors."""

from typing import Any, NamedTuple

import msgspec

from engine.api.common_fields import check_bookkeeping
from engine.errors import RequestError
from engine.frontend.text_pairs import Pairs, make_pairs
from engine.frontend.truncation import kept_of_text
from engine.pooling import PoolingSpec

ENCODING_FORMATS = ("float", "base64")
NUMBER_TYPES = ("float32", "float16", "bfloat16")
BYTE_ORDERS = ("native", "little", "big")
# The names under which a request may have the two texts of its pairs.
PAIR_FIELDS = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))

Texts = str | list[str]


class NumberFormat(NamedTuple):
    """How the numbers of a vector are written; the last two matter for base64 only."""

    as_base64: bool
    number_type: str
    byte_order: str


class PoolingRequest(msgspec.Struct, kw_only=True):
    """The fields that all requests to a model that pools have in common."""

    model: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None
    use_activation: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = None
    user: str | None = None

    def keep(self, max_model_len: int) -> int | None:
        """How many tokens of a prompt to keep, None for all. Raises RequestError if a field is out of range."""
        check_bookkeeping(self)
        side = self.truncation_side
        if side not in (None, "left", "right"):
            raise RequestError(f"truncation_side must be 'left' or 'right', not {side!r}", "truncation_side")
        return kept_of_text(self.truncate_prompt_tokens, max_model_len)


class InputRequest(PoolingRequest, kw_only=True):
    input: str | list[str | int | list[int]]
    add_special_tokens: bool | None = None


class ClassifyRequest(InputRequest, kw_only=True):
    pass


class EmbeddingRequest(InputRequest, kw_only=True):
    encoding_format: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    embed_dtype: str | None = None
    endianness: str | None = None

    def number_format(self) -> NumberFormat:
        """How vectors are written. Raises RequestError for a value that is not known."""
        chosen = []
        for name, known in (
            ("encoding_format", ENCODING_FORMATS), ("embed_dtype", NUMBER_TYPES), ("endianness", BYTE_ORDERS),
        ):  # fmt: skip
            value = getattr(self, name) or known[0]
            if value not in known:
                raise RequestError(f"{name} must be one of {', '.join(known)}, not {value!r}", name)
            chosen.append(value)
        encoding, number_type, byte_order = chosen
        return NumberFormat(encoding == "base64", number_type, byte_order)

    def normalizes(self, spec: PoolingSpec) -> bool:
        """Whether vectors are divided by their length. Raises RequestError if two fields contradict each other."""
        given = {value for value in (self.normalize, self.use_activation) if value is not None}
        if len(given) > 1:
            raise RequestError("normalize and use_activation are the same, but differ: give only one", "use_activation")
        return given.pop() if given else spec.normalize


class VectorRequest(EmbeddingRequest, kw_only=True):
    """The body of /pooling."""

    task: str | None = None

    def check_task(self, spec: PoolingSpec) -> None:
        """Raise RequestError for a task that the model does not have."""
        if self.task not in (None, spec.task):
            raise RequestError(f"task must be {spec.task!r}, what this model does, not {self.task!r}", "task")


class PairRequest(PoolingRequest, kw_only=True):
    """The fields of requests for scores of pairs."""

    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None

    def most_tokens(self, max_model_len: int) -> tuple[int | None, int | None]:
        """How many tokens the first and the second text may have; the rest is cut off. Raises RequestError."""
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            if not 0 <= (getattr(self, name) or 0) < max_model_len:
                message = f"{name} must be 0 (all) or lie below {max_model_len} (--max-model-len)"
                raise RequestError(f"{message}, not {getattr(self, name)}", name)
        return self.max_tokens_per_query or None, self.max_tokens_per_doc or None


class ScoreRequest(PairRequest, kw_only=True):
    """The two texts are in one of the pairs of PAIR_FIELDS."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    def fields(self) -> tuple[str, str]:
        """The fields that have the texts. Raises RequestError if one is missing, or there are others."""
        names = list(dict.fromkeys(name for pair in PAIR_FIELDS for name in pair))
        given = [name for name in names if getattr(self, name) is not None]
        pair = max(PAIR_FIELDS, key=lambda pair: sum(name in given for name in pair))
        for name in pair:
            if name not in given:
                raise RequestError(f"{name} is missing", name)
        if others := [name for name in given if name not in pair]:
            raise RequestError(f"{others[0]} is given beside {pair[0]} and {pair[1]}: leave it out", others[0])
        return pair

    def pairs(self) -> Pairs:
        """The pairs of texts. Raises RequestError."""
        first, second = self.fields()
        return make_pairs(getattr(self, first), getattr(self, second), (first, second))


class RerankRequest(PairRequest, kw_only=True):
    query: str
    documents: str | list[str | dict[str, Any]]
    top_n: int | None = None
    return_documents: bool | None = None

    def texts(self) -> list[str]:
        """The documents, which may be objects with a `text`. Raises RequestError if there is none."""
        if not self.documents:
            raise RequestError("documents is an empty list", "documents")
        given = [self.documents] if isinstance(self.documents, str) else self.documents
        return [_text_of(one, f"documents[{number}]") for number, one in enumerate(given)]

    def most_results(self, documents: int) -> int:
        """How many results to return. Raises RequestError for a number that is out of range."""
        if self.top_n is not None and self.top_n < 0:
            raise RequestError(f"top_n must be at least 1, or 0 for all, not {self.top_n}", "top_n")
        return self.top_n or documents


def _text_of(document: str | dict[str, Any], field: str) -> str:
    text = document if isinstance(document, str) else document.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{field} must be a text, or an object with a text", field)
    return text
