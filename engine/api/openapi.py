"""The server's OpenAPI document: request schemas from the bodies' own classes, answers from openapi_answers."""

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import msgspec

from engine.api.adapters import LoadRequest, UnloadRequest
from engine.api.chat_protocol import ChatRequest, TokenizeRequest
from engine.api.openapi_answers import ANSWERS
from engine.api.protocol import CompletionRequest, DetokenizeRequest

VERSION = "3.1.0"
REFERENCE = "#/components/schemas/{name}"
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"

ERRORS = {
    400: "The request can't be served as it is; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The server was not started with the flag that allows this; the message names it.",
    404: "The model, or the path, is not served here.",
    405: "The path is not served with this method; `Allow` names those that are.",
    413: "The body is larger than the server takes.",
    415: "The body is not declared as application/json.",
    500: "The server could not serve this request.",
    503: "The engine is gone, or its queue is full; `Retry-After` says when to try again in the latter case.",
}


class Route(msgspec.Struct, frozen=True):
    """One operation: what it takes and what it answers."""

    method: str
    path: str
    summary: str
    answer: str  # schema of the 200
    body: type[msgspec.Struct] | None = None
    media_types: tuple[str, ...] = (JSON,)


ROUTES: tuple[Route, ...] = (
    Route("get", "/v1/models", "The models and adapters that are served", "ModelList"),
    Route("post", "/v1/completions", "Continue texts or token ids", "Completion", CompletionRequest, (JSON, EVENTS)),
    Route("post", "/v1/chat/completions", "Continue a conversation", "ChatCompletion", ChatRequest, (JSON, EVENTS)),
    Route("post", "/tokenize", "Token ids of a text or a conversation", "Tokenized", TokenizeRequest),
    Route("post", "/detokenize", "The text of token ids", "Detokenized", DetokenizeRequest),
    Route("post", "/reset_prefix_cache", "Empty the prefix cache", "PrefixCacheReset"),
    Route("post", "/v1/load_lora_adapter", "Load a LoRA adapter", "Text", LoadRequest, (TEXT,)),
    Route("post", "/v1/unload_lora_adapter", "Unload a LoRA adapter", "Text", UnloadRequest, (TEXT,)),
    Route("get", "/health", "Whether the engine steps", "Health"),
    Route("get", "/version", "The version of the server", "Version"),
    Route("get", "/metrics", "Counters and histograms for Prometheus", "Text", None, (TEXT,)),
    Route("get", "/openapi.json", "This document", "Document"),
)


def openapi_document(root_path: str = "") -> dict[str, Any]:
    """Build the document; all of its references resolve within it. `root_path` is where a proxy shows the server."""
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
            "schemas": schemas | ANSWERS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def operation(route: Route) -> dict[str, Any]:
    """One operation of the document."""
    found: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method}{route.path.replace('/', '_').replace('.', '_')}",
        "responses": {"200": answer("The answer.", route.answer, route.media_types)},
    }
    if route.path == "/health":
        found["responses"]["503"] = answer("The engine is gone or hangs; `cause` says why.", "Health", (JSON,))
    for status, description in ERRORS.items():
        found["responses"].setdefault(str(status), answer(description, "Error", (JSON,)))
    if route.body is not None:
        schema = {"$ref": REFERENCE.format(name=route.body.__name__)}
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    return found


def answer(description: str, schema: str, media_types: Sequence[str]) -> dict[str, Any]:
    """A response; an event stream's schema is that of its text."""
    reference = {"$ref": REFERENCE.format(name=schema)}
    content = {kind: {"schema": {"type": "string"} if kind == EVENTS else reference} for kind in media_types}
    return {"description": description, "content": content}
