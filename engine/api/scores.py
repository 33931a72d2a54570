"""/score and /rerank: how well texts suit a query.

A model with a classification head reads both texts together. Of a model that embeds, the score is the cosine of the two
embeddings.
"""

from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from engine.api.embeddings import errors_name, own_id, pooling_usage, spec_of, tokenized
from engine.api.event_stream import run_until_disconnect
from engine.api.pooling_protocol import PairRequest, RerankRequest, ScoreRequest
from engine.api.render import new_head
from engine.api.state import LONG_TEXT, ApiState
from engine.errors import RequestError
from engine.frontend.streams import RequestStream
from engine.frontend.text_pairs import PairLimits, Pairs, encode_pairs
from engine.frontend.vectors import POOLING, collect_vectors, cosines, score_of, special_frame

SCORE_PATHS, RERANK_PATHS = ("/v1/score", "/score"), ("/v1/rerank", "/rerank", "/v2/rerank")

Fields = tuple[str, str]  # of the request, that have the first and the second texts


async def score(state: ApiState, request: Request) -> Response:
    body = await state.read(request, ScoreRequest)
    pairs = body.pairs()
    head = new_head("score", "list", body.model or state.model, own_id(request, body))
    scores, usage = await score_pairs(state, request, body, pairs, head, body.fields())
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    return Response(msgspec.json.encode(head | {"data": data, "usage": usage}), media_type="application/json")


async def rerank(state: ApiState, request: Request) -> Response:
    body = await state.read(request, RerankRequest)
    documents = body.texts()
    most = body.most_results(len(documents))
    head = new_head("rerank", "list", body.model or state.model, own_id(request, body))
    pairs = [(body.query, document) for document in documents]
    scores, usage = await score_pairs(state, request, body, pairs, head, ("query", "documents"))
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:most]
    shown = body.return_documents is not False
    results = [
        {"index": index, "relevance_score": scores[index]} | ({"document": {"text": documents[index]}} if shown else {})
        for index in order
    ]
    found = {"id": head["id"], "model": head["model"], "results": results, "usage": usage}
    return Response(msgspec.json.encode(found), media_type="application/json")


async def score_pairs(
    state: ApiState, request: Request, body: PairRequest, pairs: Pairs, head: dict[str, Any], fields: Fields
) -> tuple[list[float], dict[str, Any]]:
    """The score of each pair, and the usage."""
    await state.adapter_of(body.model)
    state.check_prompts(len(pairs), fields[1])
    compute = _score_by_head if spec_of(state).task == "classify" else _score_by_cosine
    scores, stream = await compute(state, request, body, pairs, head, fields)
    return scores, pooling_usage(stream)


async def _score_by_head(
    state: ApiState, request: Request, body: PairRequest, pairs: Pairs, head: dict[str, Any], fields: Fields
) -> tuple[list[float], RequestStream]:
    """Scores of a model that reads both texts of a pair."""
    spec, tokenizer = spec_of(state), state.tokenizer
    most = state.client.ready.max_model_len
    limits = PairLimits(body.keep(most), *body.most_tokens(most))
    if body.truncation_side == "left":
        message = "of a pair of texts the end of the second one is cut off: leave truncation_side out"
        raise RequestError(message, "truncation_side")
    for texts, cut, field in zip(
        zip(*pairs, strict=True), (limits.first, limits.second or limits.prompt), fields, strict=True
    ):
        if cut is None:
            state.check_texts(texts, field)
    long = sum(len(first) + len(second) for first, second in pairs) >= LONG_TEXT
    with errors_name(fields[1]):
        prompts = (
            await state.on_thread(encode_pairs, tokenizer, pairs, limits)
            if long
            else encode_pairs(tokenizer, pairs, limits)
        )
        segments = [one.second_segment for one in prompts]
        stream = state.submit(request, body, [one.ids for one in prompts], POOLING, head, "", second_segments=segments)
    vectors = await run_until_disconnect(request.receive, stream, lambda: collect_vectors(stream))
    return [score_of(one, spec, activate=body.use_activation is not False) for one in vectors], stream


async def _score_by_cosine(
    state: ApiState, request: Request, body: PairRequest, pairs: Pairs, head: dict[str, Any], fields: Fields
) -> tuple[list[float], RequestStream]:
    """Cosines of the embeddings of pairs. A text that several pairs have is embedded once."""
    limits = body.most_tokens(state.client.ready.max_model_len)
    made: dict[str, list[int]] = {}
    for texts, most, field in zip(zip(*pairs, strict=True), limits, fields, strict=True):
        missing = [text for text in dict.fromkeys(texts) if text not in made]
        with errors_name(field):
            found = await tokenized(state, missing, body, spec_of(state), most=_with_frame(state, most))
            for prompt in found:
                state.client.check_prompt(prompt)
        made |= dict(zip(missing, found, strict=True))
    stream = state.submit(request, body, list(made.values()), POOLING, head, "")
    vectors = await run_until_disconnect(request.receive, stream, lambda: collect_vectors(stream))
    return cosines(pairs, dict(zip(made, vectors, strict=True))), stream


def _with_frame(state: ApiState, most: int | None) -> int | None:
    """The most tokens of a prompt whose text may have `most`."""
    return None if most is None else most + sum(map(len, special_frame(state.tokenizer)))
