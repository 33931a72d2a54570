"""Which endpoints a model has: one that generates texts has others than one that returns embeddings or scores."""

from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.responses import Response

from engine.api.error_responses import ApiError
from engine.api.state import ApiState
from engine.messages import Ready
from engine.pooling import HOW_TO_EMBED

Endpoint = Callable[[ApiState, Request], Awaitable[Response]]

GENERATES, EMBEDS, CLASSIFIES = "generate", "embed", "classify"
# What the model of this server does, and what to do instead.
DESCRIPTIONS = {
    GENERATES: f"generates texts (a server started with {HOW_TO_EMBED} returns embeddings)",
    EMBEDS: "returns embeddings and generates no texts: use /v1/embeddings",
    CLASSIFIES: "returns scores of a classification head and generates no texts: use /score, /rerank or /classify",
}


def kind_of(ready: Ready) -> str:
    """What the model does."""
    return GENERATES if ready.pooling is None else ready.pooling.task


def for_models(endpoint: Endpoint, kinds: tuple[str, ...], kind: str) -> Endpoint:
    """The endpoint if the model is of one of these kinds; otherwise one that refuses all requests."""
    if kind in kinds:
        return endpoint

    async def refuse(_state: ApiState, request: Request) -> Response:
        message = f"{request.url.path} is not available: the model of this server {DESCRIPTIONS[kind]}"
        raise ApiError(400, message, code="wrong_model_kind")

    return refuse
