"""The OpenAPI document: request schemas from the classes of the bodies, response schemas from `openapi_responses`."""

import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import msgspec

from engine.api.chat_protocol import ChatRequest, TokenizeRequest
from engine.api.lora_endpoints import LoadRequest, UnloadRequest
from engine.api.messages.protocol import CountTokensRequest, MessagesRequest
from engine.api.messages.schemas import MESSAGES_API
from engine.api.openapi_messages import with_messages
from engine.api.openapi_responses import REFERENCE, RESPONSES, STRING, ref
from engine.api.pooling_protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    VectorRequest,
)
from engine.api.protocol import CompletionRequest, DetokenizeRequest
from engine.api.responses.protocol import ResponsesRequest
from engine.api.responses.schemas import RESPONSES_API
from engine.api.scaling import ScaleRequest
from engine.api.scores import RERANK_PATHS, SCORE_PATHS

VERSION = "3.1.0"
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"

ERRORS = {
    400: "The request is not valid; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The server was not started with the flag that allows this; the message names it.",
    404: "The model, the response or the path does not exist.",
    405: "The path does not have this method; `Allow` lists its methods.",
    413: "The body exceeds a limit of the server.",
    415: "The body is not declared as application/json.",
    429: "The API key has as many requests as it may have at once; `Retry-After` is the time to wait.",
    500: "Internal error.",
    503: "The engine is gone, or the queue is full; then `Retry-After` is the time to wait.",
    504: "The request took longer than the server allows.",
}
# Of Anthropic's API, besides these.
MORE_ERRORS = {503: "The engine is gone.", 529: "The queue is full; `Retry-After` is the time to wait."}


class Route(msgspec.Struct, frozen=True):
    """One operation, with its request body and its response."""

    method: str
    path: str
    summary: str
    response: str  # schema of the 200
    body: type[msgspec.Struct] | None = None
    media_types: tuple[str, ...] = (JSON,)
    anthropic: bool = False  # errors are in the form of this API


ROUTES: tuple[Route, ...] = (
    Route("get", "/v1/models", "The served models and adapters", "ModelList"),
    Route("get", "/v1/models/{model}", "One of them", "Model"),
    Route("post", "/v1/completions", "Continue texts or token ids", "Completion", CompletionRequest, (JSON, EVENTS)),
    Route("post", "/v1/chat/completions", "Continue a conversation", "ChatCompletion", ChatRequest, (JSON, EVENTS)),
    Route("post", "/v1/embeddings", "Embeddings of texts or token ids", "EmbeddingList", EmbeddingRequest),
    Route(
        "post", "/pooling", "The vectors of texts or token ids, whatever the model computes", "Pooled", VectorRequest
    ),
    Route("post", "/classify", "The probability of the model's class for each text", "Classified", ClassifyRequest),
    *(Route("post", path, "Scores of pairs of texts", "ScoreList", ScoreRequest) for path in SCORE_PATHS),
    *(
        Route("post", path, "Documents in the order of their scores for a query", "Reranked", RerankRequest)
        for path in RERANK_PATHS
    ),
    Route("post", "/v1/responses", "Answer a list of items", "Response", ResponsesRequest, (JSON, EVENTS)),
    Route("get", "/v1/responses/{response_id}", "A response that is kept", "Response"),
    Route("delete", "/v1/responses/{response_id}", "Forget it", "ResponseDeleted"),
    Route("get", "/v1/responses/{response_id}/input_items", "The items that it answers", "InputItemList"),
    Route("post", "/v1/responses/{response_id}/cancel", "Refused: a response that is kept has ended", "Response"),
    Route(
        "post",
        "/v1/messages",
        "Continue a conversation, in the form of Anthropic's API",
        "MessagesMessage",
        MessagesRequest,
        (JSON, EVENTS),
        anthropic=True,
    ),
    Route(
        "post",
        "/v1/messages/count_tokens",
        "The number of tokens of its prompt",
        "MessagesTokens",
        CountTokensRequest,
        anthropic=True,
    ),
    Route("post", "/tokenize", "Token ids of a text or a conversation", "Tokenized", TokenizeRequest),
    Route("post", "/detokenize", "The text of token ids", "Detokenized", DetokenizeRequest),
    Route("post", "/reset_prefix_cache", "Empty the prefix cache", "PrefixCacheReset"),
    Route("post", "/v1/load_lora_adapter", "Load a LoRA adapter", "Text", LoadRequest, (TEXT,)),
    Route("post", "/v1/unload_lora_adapter", "Unload a LoRA adapter", "Text", UnloadRequest, (TEXT,)),
    Route("post", "/scale", "Add or drain replicas", "Scaling", ScaleRequest),
    Route("get", "/scale", "How far that is", "Scaling"),
    Route("get", "/health", "The state of the engine", "Health"),
    Route("get", "/ping", "The same, under the path that some platforms expect", "Health"),
    Route("post", "/ping", "The same", "Health"),
    Route("get", "/load", "How many requests the server is working on", "Load"),
    Route(
        "post",
        "/invocations",
        "One of the other endpoints, by the fields of the body",
        "Anything",
        None,
        (JSON, EVENTS),
    ),
    Route("get", "/ready", "Whether tokens can be produced", "Ready"),
    Route("get", "/version", "The version of the server", "Version"),
    Route("get", "/metrics", "Counters and histograms for Prometheus", "Text", None, (TEXT,)),
    Route("get", "/openapi.json", "This document", "Document"),
)


def openapi_document(root_path: str = "") -> dict[str, Any]:
    """Build the document, whose references are all internal. `root_path` is the prefix of a reverse proxy."""
    bodies = [route.body for route in ROUTES if route.body is not None]
    _, schemas = msgspec.json.schema_components(bodies, ref_template=REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method] = operation(route)
    return {
        "openapi": VERSION,
        "info": {"title": "Redline", "version": metadata.version("redline-llm")},
        **({"servers": [{"url": root_path}]} if root_path else {}),
        "paths": paths,
        "components": {
            "schemas": with_messages(schemas) | RESPONSES | RESPONSES_API | MESSAGES_API,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x_api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{}, {"key": []}, {"x_api_key": []}],
    }


def operation(route: Route) -> dict[str, Any]:
    """One operation of the document."""
    found: dict[str, Any] = {
        "summary": route.summary,
        "operationId": route.method + re.sub(r"\W+", "_", route.path).rstrip("_"),
        "responses": {"200": response("The result.", route.response, route.media_types)},
    }
    if parameters := re.findall(r"\{(\w+)\}", route.path):
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": STRING} for name in parameters]
    if route.response == "Health":
        found["responses"]["503"] = response(
            "The engine is gone, is restarted, or hangs; `cause` is the reason.", "Health", (JSON,)
        )
    errors, schema = (ERRORS | MORE_ERRORS, "MessagesError") if route.anthropic else (ERRORS, "Error")
    for status, description in errors.items():
        found["responses"].setdefault(str(status), response(description, schema, (JSON,)))
    if route.body is not None:
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": ref(route.body.__name__)}}}
    return found


def response(description: str, schema: str, media_types: Sequence[str]) -> dict[str, Any]:
    """A response; the schema of an event stream is a string."""
    content = {kind: {"schema": {"type": "string"} if kind == EVENTS else ref(schema)} for kind in media_types}
    return {"description": description, "content": content}
