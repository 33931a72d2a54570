"""Vectors of texts or token ids: /v1/embeddings, /pooling and /classify."""

import base64
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from fastapi import Request
from starlette.responses import Response

from engine.api.common_fields import split_prompts
from engine.api.event_stream import run_until_disconnect
from engine.api.pooling_protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    InputRequest,
    NumberFormat,
    PoolingRequest,
    VectorRequest,
)
from engine.api.render import new_head
from engine.api.request_id import client_id
from engine.api.state import LONG_TEXT, ApiState
from engine.arrays import Float32s
from engine.errors import RequestError
from engine.frontend.streams import RequestStream
from engine.frontend.vectors import (
    POOLING,
    check_dimensions,
    collect_vectors,
    embedding_of,
    encode_texts,
    score_of,
)
from engine.pooling import PoolingSpec

MANY_NUMBERS = 1 << 16  # from here on, vectors are written on a thread, so that other requests continue


async def embeddings(state: ApiState, request: Request) -> Response:
    body = await state.read(request, EmbeddingRequest)
    return await vectors_response(state, request, body, "embd", "embedding", "embedding")


async def pool(state: ApiState, request: Request) -> Response:
    """vLLM's /pooling: the vector of each text, whatever the model computes."""
    body = await state.read(request, VectorRequest)
    body.check_task(spec_of(state))
    return await vectors_response(state, request, body, "pool", "pooling", "data")


async def vectors_response(
    state: ApiState, request: Request, body: EmbeddingRequest, prefix: str, kind: str, field: str
) -> Response:
    """The vectors of the request's texts.

    Args:
        state: of the API process.
        request: of the client.
        body: of the request.
        prefix: of the response's id.
        kind: the `object` of each item.
        field: of an item, which has its vector.
    """
    spec = spec_of(state)
    check_dimensions(body.dimensions, spec)
    number_format, normalize = body.number_format(), body.normalizes(spec)
    head = new_head(prefix, "list", body.model or state.model, own_id(request, body))
    stream, vectors = await pooled(state, request, body, head)

    def render() -> bytes:
        if spec.task == "classify":
            made = [_one_number(score_of(one, spec, activate=body.use_activation is not False)) for one in vectors]
        else:
            made = [embedding_of(one, body.dimensions, normalize=normalize) for one in vectors]
        data = [{"object": kind, "index": index, field: written(one, number_format)} for index, one in enumerate(made)]
        return msgspec.json.encode(head | {"data": data, "usage": pooling_usage(stream)})

    many = sum(map(len, vectors)) >= MANY_NUMBERS
    return Response(await state.on_thread(render) if many else render(), media_type="application/json")


async def classify(state: ApiState, request: Request) -> Response:
    """vLLM's /classify: the probability of the model's label for each text."""
    spec = spec_of(state)
    body = await state.read(request, ClassifyRequest)
    head = new_head("classify", "list", body.model or state.model, own_id(request, body))
    stream, vectors = await pooled(state, request, body, head)
    scores = [score_of(one, spec, activate=body.use_activation is not False) for one in vectors]
    data = [
        {"index": index, "label": spec.label or None, "probs": [score], "num_classes": 1}
        for index, score in enumerate(scores)
    ]
    found = msgspec.json.encode(head | {"data": data, "usage": pooling_usage(stream)})
    return Response(found, media_type="application/json")


async def pooled(
    state: ApiState, request: Request, body: InputRequest, head: dict[str, Any]
) -> tuple[RequestStream, list[Float32s]]:
    """Compute the vectors of the request's `input`."""
    await state.adapter_of(body.model)
    given = split_prompts(body.input, "input")
    state.check_prompts(len(given), "input")
    special = body.add_special_tokens is not False
    with errors_name("input"):
        prompts = await tokenized(state, given, body, spec_of(state), add_special_tokens=special)
        stream = state.submit(request, body, prompts, POOLING, head, "")
    return stream, await run_until_disconnect(request.receive, stream, lambda: collect_vectors(stream))


@contextlib.contextmanager
def errors_name(field: str) -> Iterator[None]:
    """Errors about a prompt name the field of the endpoint that has its text."""
    try:
        yield
    except RequestError as error:
        if error.field not in ("input", "prompt"):
            raise
        raise type(error)(str(error), field) from error


def spec_of(state: ApiState) -> PoolingSpec:
    spec = state.client.ready.pooling
    assert spec is not None, "the route exists for models that pool only"
    return spec


def own_id(request: Request, body: PoolingRequest) -> str:
    """The name that the client gave the request; empty if it gave none."""
    return client_id(request.scope) or body.request_id or ""


def written(vector: Float32s, number_format: NumberFormat) -> list[float] | str:
    """A vector as numbers, or as base64 of its bytes."""
    if not number_format.as_base64:
        return vector.tolist()
    order = ">" if number_format.byte_order == "big" else "<"
    if number_format.number_type == "bfloat16":
        bits = vector.astype(np.float32).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to the nearest, ties to even
        data = rounded.astype(f"{order}u2")
    else:
        data = vector.astype(order + {"float32": "f4", "float16": "f2"}[number_format.number_type])
    return base64.b64encode(data.tobytes()).decode("ascii")


def _one_number(value: float) -> Float32s:
    return np.array([value], np.float32)


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
    most: int | None = None,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Token ids of texts, truncated as the request specifies, and to `most` tokens.

    Raises RequestError for a text that is too long.
    """
    limit = state.client.ready.max_model_len
    keep, side, tokenizer = body.keep(limit), body.truncation_side, state.tokenizer
    if most is not None:
        keep = min(most, limit if keep is None else keep)
    texts = [one for one in given if isinstance(one, str)]
    if keep is None:
        state.check_texts(texts, "input")

    def encode() -> list[list[int]]:
        return encode_texts(tokenizer, spec, given, limit, keep=keep, side=side, add_special_tokens=add_special_tokens)

    return await state.on_thread(encode) if sum(map(len, texts)) >= LONG_TEXT else encode()
