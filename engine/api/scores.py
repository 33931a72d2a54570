"""/v1/score and /v1/rerank: how well texts suit a query.

A model with a classification head reads both texts together. Of a model that embeds, the score is the cosine of the two
embeddings.
"""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from fastapi import Request
from starlette.responses import Response

from engine.api.embeddings import own_id, pooling_usage, spec_of, tokenized
from engine.api.event_stream import run_until_disconnect
from engine.api.pooling_protocol import PoolingRequest, RerankRequest, ScoreRequest
from engine.api.render import new_head
from engine.api.state import LONG_TEXT, ApiState
from engine.arrays import Float32s
from engine.errors import RequestError
from engine.frontend.streams import RequestStream
from engine.frontend.text_pairs import TextPair, encode_pair, pair_frame
from engine.frontend.vectors import POOLING, collect_vectors, embedding_of, score_of

Pairs = list[tuple[str, str]]


async def score(state: ApiState, request: Request) -> Response:
    body = await state.read(request, ScoreRequest)
    pairs = body.pairs()
    head = new_head("score", "list", body.model or state.model, own_id(request, body))
    scores, usage = await score_pairs(state, request, body, pairs, head, "text_2")
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    return Response(msgspec.json.encode(head | {"data": data, "usage": usage}), media_type="application/json")


async def rerank(state: ApiState, request: Request) -> Response:
    body = await state.read(request, RerankRequest)
    most = body.most_results()
    head = new_head("rerank", "list", body.model or state.model, own_id(request, body))
    pairs = [(body.query, document) for document in body.documents]
    scores, usage = await score_pairs(state, request, body, pairs, head, "documents")
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:most]
    shown = body.return_documents is not False
    results = [
        {"index": index, "relevance_score": scores[index]}
        | ({"document": {"text": body.documents[index]}} if shown else {})
        for index in order
    ]
    found = {"id": head["id"], "model": head["model"], "results": results, "usage": usage}
    return Response(msgspec.json.encode(found), media_type="application/json")


async def score_pairs(
    state: ApiState, request: Request, body: PoolingRequest, pairs: Pairs, head: dict[str, Any], field: str
) -> tuple[list[float], dict[str, Any]]:
    """The score of each pair, and the usage. `field` has the second texts, for errors."""
    await state.adapter_of(body.model)
    state.check_prompts(len(pairs), field)
    compute = _score_by_head if spec_of(state).task == "classify" else _score_by_cosine
    scores, stream = await compute(state, request, body, pairs, head)
    return scores, pooling_usage(stream)


async def _score_by_head(
    state: ApiState, request: Request, body: PoolingRequest, pairs: Pairs, head: dict[str, Any]
) -> tuple[list[float], RequestStream]:
    """Scores of a model that reads both texts of a pair."""
    spec, tokenizer = spec_of(state), state.tokenizer
    keep = body.keep(state.client.ready.max_model_len)
    if body.truncation_side == "left":
        message = "of a pair of texts the end of the second one is cut off: leave truncation_side out"
        raise RequestError(message, "truncation_side")
    texts = [text for pair in pairs for text in pair]
    state.check_texts([first for first, _ in pairs] if keep is not None else texts, "input")

    def encode() -> list[TextPair]:
        frame = pair_frame(tokenizer)
        return [encode_pair(tokenizer, frame, first, second, keep) for first, second in pairs]

    prompts = await _on_thread_if_long(state, encode, texts)
    segments = [one.second_segment for one in prompts]
    stream = state.submit(request, body, [one.ids for one in prompts], POOLING, head, "", second_segments=segments)
    vectors = await run_until_disconnect(request.receive, stream, lambda: collect_vectors(stream))
    return [score_of(one, spec) for one in vectors], stream


async def _score_by_cosine(
    state: ApiState, request: Request, body: PoolingRequest, pairs: Pairs, head: dict[str, Any]
) -> tuple[list[float], RequestStream]:
    """Cosines of the embeddings of pairs. A text that several pairs have is embedded once."""
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    prompts = await tokenized(state, texts, body, spec_of(state), add_special_tokens=True)
    stream = state.submit(request, body, prompts, POOLING, head, "")
    vectors = await run_until_disconnect(request.receive, stream, lambda: collect_vectors(stream))
    made: dict[str, Float32s] = {
        text: embedding_of(vector, None, normalize=True) for text, vector in zip(texts, vectors, strict=True)
    }
    return [float(np.dot(made[first], made[second])) for first, second in pairs], stream


async def _on_thread_if_long(
    state: ApiState, work: Callable[[], list[TextPair]], texts: Sequence[str]
) -> list[TextPair]:
    return await state.on_thread(work) if sum(map(len, texts)) >= LONG_TEXT else work()
