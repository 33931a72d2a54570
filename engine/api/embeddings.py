"""/v1/embeddings: the vectors of texts or token ids."""

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from fastapi import Request
from starlette.responses import Response

from engine.api.common_fields import split_prompts
from engine.api.event_stream import run_until_disconnect
from engine.api.pooling_protocol import EmbeddingRequest, PoolingRequest
from engine.api.render import new_head
from engine.api.request_id import client_id
from engine.api.state import LONG_TEXT, ApiState
from engine.arrays import Float32s
from engine.frontend.streams import RequestStream
from engine.frontend.vectors import (
    POOLING,
    check_dimensions,
    collect_vectors,
    embedding_of,
    encode_truncated,
)
from engine.pooling import PoolingSpec

MANY_NUMBERS = 1 << 16  # from here on, embeddings are written on a thread, so that other requests continue


async def embeddings(state: ApiState, request: Request) -> Response:
    spec = spec_of(state)
    body = await state.read(request, EmbeddingRequest)
    await state.adapter_of(body.model)
    check_dimensions(body.dimensions, spec)
    as_base64, normalize = body.as_base64, spec.normalize if body.normalize is None else body.normalize
    given = split_prompts(body.input, "input")
    state.check_prompts(len(given), "input")
    prompts = await tokenized(state, given, body, spec, add_special_tokens=body.add_special_tokens is not False)
    head = new_head("embd", "list", body.model or state.model, own_id(request, body))
    stream = state.submit(request, body, prompts, POOLING, head, "")
    vectors = await run_until_disconnect(request.receive, stream, lambda: collect_vectors(stream))

    def render() -> bytes:
        made = [embedding_of(one, body.dimensions, normalize=normalize) for one in vectors]
        data = [
            {"object": "embedding", "index": index, "embedding": written(one, as_base64=as_base64)}
            for index, one in enumerate(made)
        ]
        return msgspec.json.encode(head | {"data": data, "usage": pooling_usage(stream)})

    many = sum(map(len, vectors)) >= MANY_NUMBERS
    return Response(await state.on_thread(render) if many else render(), media_type="application/json")


def spec_of(state: ApiState) -> PoolingSpec:
    spec = state.client.ready.pooling
    assert spec is not None, "the route exists for models that pool only"
    return spec


def own_id(request: Request, body: PoolingRequest) -> str:
    """The name that the client gave the request; empty if it gave none."""
    return client_id(request.scope) or body.request_id or ""


def written(vector: Float32s, *, as_base64: bool) -> list[float] | str:
    """A vector as numbers, or as base64 of little-endian float32."""
    if not as_base64:
        return vector.tolist()
    return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode("ascii")


def pooling_usage(stream: RequestStream) -> dict[str, Any]:
    tokens = stream.prompt_tokens
    details = {"cached_tokens": sum(stream.cached_tokens)}
    return {"prompt_tokens": tokens, "total_tokens": tokens, "prompt_tokens_details": details}


async def tokenized(
    state: ApiState,
    given: Sequence[str | list[int]],
    body: PoolingRequest,
    spec: PoolingSpec,
    *,
    add_special_tokens: bool,
) -> list[list[int]]:
    """Token ids of texts, truncated as the request specifies. Raises RequestError for a text that is too long."""
    most = state.client.ready.max_model_len
    keep, side, tokenizer = body.keep(most), body.truncation_side, state.tokenizer
    texts = [one for one in given if isinstance(one, str)]
    if keep is None:
        state.check_texts(texts, "input")

    def encode(one: str | list[int]) -> list[int]:
        if isinstance(one, list):
            return one if keep is None else one[-keep:] if side == "left" else one[:keep]
        text = one.lower() if spec.lowercase else one
        if keep is None:
            return tokenizer.encode_prompt(text, add_special_tokens, most)
        return encode_truncated(tokenizer, text, keep, side, add_special_tokens)

    def encode_all() -> list[list[int]]:
        return list(map(encode, given))

    return await state.on_thread(encode_all) if sum(map(len, texts)) >= LONG_TEXT else encode_all()
