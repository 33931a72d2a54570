"""Embeddings and scores without a server, for `LLM`."""

from collections.abc import Sequence

from engine.arrays import Float32s
from engine.errors import RequestError
from engine.frontend.connect import EngineClient
from engine.frontend.streams import RequestStream
from engine.frontend.text_pairs import PairLimits, encode_pairs, make_pairs
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.truncation import kept_of_text
from engine.frontend.vectors import (
    POOLING,
    check_dimensions,
    collect_vectors,
    cosines,
    embedding_of,
    encode_texts,
    score_of,
)
from engine.llm_outputs import EmbeddingOutput, EmbeddingRequestOutput, ScoringOutput, ScoringRequestOutput
from engine.pooling import HOW_TO_EMBED, PoolingSpec

PAIR_ARGUMENTS = ("data_1", "data_2")  # of LLM.score


class PoolingCalls:
    """The calls of one engine whose model pools. The constructor raises RequestError for another model."""

    def __init__(self, client: EngineClient, tokenizer: Tokenizer):
        spec = client.ready.pooling
        if spec is None:
            raise RequestError(f"this model generates texts: for embeddings start it with {HOW_TO_EMBED}")
        self._client = client
        self._tokenizer = tokenizer
        self._spec: PoolingSpec = spec
        self._most = client.ready.max_model_len

    async def embed(
        self,
        prompts: Sequence[str | list[int]],
        dimensions: int | None,
        normalize: bool | None,
        truncate: int | None,
    ) -> list[EmbeddingRequestOutput]:
        """See `LLM.embed`."""
        spec = self._spec
        if spec.task != "embed":
            raise RequestError("this model returns scores of pairs, not embeddings: use LLM.score")
        check_dimensions(dimensions, spec)
        stream, vectors = await self._pool(self._encode(prompts, truncate))
        normalizes = spec.normalize if normalize is None else normalize
        return [
            EmbeddingRequestOutput(
                EmbeddingOutput(embedding_of(vector, dimensions, normalize=normalizes).tolist()), ids, cached
            )
            for vector, ids, cached in zip(vectors, _ids(stream), stream.cached_tokens, strict=True)
        ]

    async def score(
        self, first: str | Sequence[str], second: str | Sequence[str], truncate: int | None, *, activate: bool
    ) -> list[ScoringRequestOutput]:
        """See `LLM.score`."""
        spec, pairs = self._spec, make_pairs(first, second, PAIR_ARGUMENTS)
        if spec.task == "embed":
            texts = list(dict.fromkeys(text for pair in pairs for text in pair))
            stream, vectors = await self._pool(self._encode(texts, truncate))
            found = dict(zip(texts, zip(_ids(stream), stream.cached_tokens, strict=True), strict=True))
            scores = cosines(pairs, dict(zip(texts, vectors, strict=True)))
            both = [(found[one], found[other]) for one, other in pairs]
            return [
                ScoringRequestOutput(ScoringOutput(value), [*one[0], *other[0]], one[1] + other[1])
                for value, (one, other) in zip(scores, both, strict=True)
            ]
        encoded = encode_pairs(self._tokenizer, pairs, PairLimits(kept_of_text(truncate, self._most)))
        segments = [one.second_segment for one in encoded]
        stream, vectors = await self._pool([one.ids for one in encoded], segments)
        return [
            ScoringRequestOutput(ScoringOutput(score_of(vector, spec, activate=activate)), ids, cached)
            for vector, ids, cached in zip(vectors, _ids(stream), stream.cached_tokens, strict=True)
        ]

    def _encode(self, prompts: Sequence[str | list[int]], truncate: int | None) -> list[list[int]]:
        return encode_texts(self._tokenizer, self._spec, prompts, self._most, keep=kept_of_text(truncate, self._most))

    async def _pool(
        self, prompts: list[list[int]], segments: Sequence[int] = ()
    ) -> tuple[RequestStream, list[Float32s]]:
        async with self._client.add_request(prompts, POOLING, second_segments=segments) as stream:
            return stream, await collect_vectors(stream)


def _ids(stream: RequestStream) -> list[list[int]]:
    return [prompt for prompt in stream.prompts if isinstance(prompt, list)]
