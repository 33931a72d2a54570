"""The HTTP application: routes, authorization, errors."""

from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from engine.api.access import RequireKey, check_media_type, is_simple
from engine.api.chat import chat_completions
from engine.api.completions import completions
from engine.api.embeddings import classify, embeddings, pool
from engine.api.error_responses import ApiError
from engine.api.invocations import invocations
from engine.api.key_limit import KeyLoads, LimitKeys
from engine.api.lora_endpoints import load_adapter, unload_adapter
from engine.api.messages.endpoints import count_tokens, create_message
from engine.api.model_kinds import CLASSIFIES, EMBEDS, GENERATES, Endpoint, for_models, kind_of
from engine.api.openapi import openapi_document
from engine.api.pacing import PacedRequests
from engine.api.prometheus import make_registry
from engine.api.readiness import Readiness
from engine.api.request_id import RequestId
from engine.api.request_timeout import RequestTimeout
from engine.api.responses.endpoints import (
    cancel_response,
    create_response,
    delete_response,
    list_input_items,
    retrieve_response,
)
from engine.api.scaling import scale, scale_state
from engine.api.scores import RERANK_PATHS, SCORE_PATHS, rerank, score
from engine.api.server_page import docs_page, server_page
from engine.api.state import ApiState
from engine.api.tokenizing import detokenize, tokenize
from engine.errors import RedlineError


def create_app(state: ApiState) -> FastAPI:
    """Build the application around an open client of the engine."""
    # Its own pages of documentation load scripts from other hosts.
    app = FastAPI(title="Redline", openapi_url=None, docs_url=None, redoc_url=None, root_path=state.options.root_path)
    for method, path, endpoint in api_routes(state):
        app.add_route(path, bind_endpoint(endpoint, state, method), methods=[method])  # HEAD is answered with GET
    if state.options.page:
        for path, page in (("/", server_page), ("/docs", docs_page)):
            app.add_route(path, bind_endpoint(page, state, "GET"), methods=["GET"], include_in_schema=False)
    app.add_exception_handler(ApiError, error_response)
    app.add_exception_handler(RedlineError, error_response)
    app.add_exception_handler(HTTPException, http_error_response)
    add_middleware(app, state)
    return app


def api_routes(state: ApiState) -> list[tuple[str, str, Endpoint]]:
    """Method, path and endpoint of each route but the pages."""
    registry, readiness = make_registry(state), Readiness(state.client)
    kind = kind_of(state.client.ready)
    routes: list[tuple[str, str, Endpoint]] = [
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{model:path}", model),  # names of models may have slashes
        ("POST", "/v1/completions", for_models(completions, (GENERATES,), kind)),
        ("POST", "/v1/chat/completions", for_models(chat_completions, (GENERATES,), kind)),
        ("POST", "/v1/embeddings", for_models(embeddings, (EMBEDS,), kind)),
        ("POST", "/pooling", for_models(pool, (EMBEDS, CLASSIFIES), kind)),
        ("POST", "/classify", for_models(classify, (CLASSIFIES,), kind)),
        *(("POST", path, for_models(score, (EMBEDS, CLASSIFIES), kind)) for path in SCORE_PATHS),
        *(("POST", path, for_models(rerank, (EMBEDS, CLASSIFIES), kind)) for path in RERANK_PATHS),
        ("POST", "/v1/responses", for_models(create_response, (GENERATES,), kind)),
        ("GET", "/v1/responses/{response_id}", retrieve_response),
        ("DELETE", "/v1/responses/{response_id}", delete_response),
        ("GET", "/v1/responses/{response_id}/input_items", list_input_items),
        ("POST", "/v1/responses/{response_id}/cancel", cancel_response),
        ("POST", "/v1/messages", for_models(create_message, (GENERATES,), kind)),
        ("POST", "/v1/messages/count_tokens", for_models(count_tokens, (GENERATES,), kind)),
        ("POST", "/tokenize", tokenize),
        ("POST", "/detokenize", detokenize),
        ("POST", "/reset_prefix_cache", reset_prefix_cache),
        ("POST", "/v1/load_lora_adapter", for_models(load_adapter, (GENERATES,), kind)),
        ("POST", "/v1/unload_lora_adapter", for_models(unload_adapter, (GENERATES,), kind)),
        ("POST", "/scale", scale),
        ("GET", "/scale", scale_state),
        ("GET", "/health", health),
        ("GET", "/ping", health),
        ("POST", "/ping", health),
        ("GET", "/load", load),
        ("GET", "/ready", lambda _state, _request: ready(readiness)),
        ("GET", "/version", version),
        ("GET", "/openapi.json", openapi),
        ("GET", "/metrics", lambda _state, _request: metrics(registry)),
    ]
    endpoints = {path: endpoint for method, path, endpoint in routes if method == "POST"}
    return [*routes, ("POST", "/invocations", invocations(endpoints, kind))]


def add_middleware(app: FastAPI, state: ApiState) -> None:
    """Add what the options ask for, the innermost first."""
    options = state.options
    if options.limits.request_timeout is not None:
        app.add_middleware(RequestTimeout, seconds=options.limits.request_timeout, client=state.client)
    if options.limits.max_requests_per_key is not None and options.api_keys:
        loads = KeyLoads(1, len(options.api_keys)) if state.key_loads is None else state.key_loads
        limit, client = options.limits.max_requests_per_key, state.client
        app.add_middleware(LimitKeys, limit=limit, loads=loads, process=state.process, client=client)
    if options.api_keys:
        app.add_middleware(RequireKey, keys=options.api_keys)
    if options.allowed_origins:  # outside the key check: a browser's CORS check has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Request-Id", "Retry-After"),
        )
    app.add_middleware(RequestId)
    app.add_middleware(PacedRequests)  # the last one added is the outermost


def bind_endpoint(endpoint: Endpoint, state: ApiState, method: str) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        if method == "POST" and not (endpoint in WITHOUT_BODY and is_simple(request)):
            check_media_type(request)
        return await endpoint(state, request)

    return respond


async def error_response(request: Request, error: Exception) -> Response:
    return ApiError.from_exception(error).response(request.scope)


async def http_error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 404:
        message = f"404 Not Found: {what}"
    elif error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(name.strip() for name in headers["Allow"].split(",")))
        message = f"405 Method Not Allowed: {what}; this path allows {headers['Allow']}"
    else:
        message = f"{what}: {error.detail}"
    return ApiError(error.status_code, message, headers=headers).response(request.scope)


def json_response(body: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def models(state: ApiState, _request: Request) -> Response:
    return json_response({"object": "list", "data": await model_cards(state)})


async def model(state: ApiState, request: Request) -> Response:
    name = request.path_params["model"]
    served = await model_cards(state)
    card = next((card for card in served if card["id"] == name), None)
    if card is None:
        known = ", ".join(repr(card["id"]) for card in served)
        raise ApiError(404, f"the model {name!r} is not served here: this server has {known}", code="model_not_found")
    return json_response(card)


async def model_cards(state: ApiState) -> list[dict[str, Any]]:
    """What clients may know of each served name and adapter."""
    ready = state.client.ready
    await state.refresh_adapters()
    served: list[tuple[str, str, str | None]] = [(name, ready.model_path, None) for name in state.names]
    served += [(name, path, state.model) for name, path in state.adapters.items()]
    return [
        {
            "id": name,
            "object": "model",
            "created": state.created,
            "owned_by": "redline",
            "root": root,
            "parent": parent,
            "max_model_len": ready.max_model_len,
            "vocab_size": ready.vocab_size,
        }
        for name, root, parent in served
    ]


async def health(state: ApiState, _request: Request) -> Response:
    """200 while the engine runs steps or is idle, 503 with the cause if it is dead, is restarted, or a step hangs.

    With replicas, the status is degraded, and still 200, while some of them are ok.
    """
    client, stats = state.client, state.client.total_stats
    core = stats.core
    age = max(0.0, client.clock.now() - core.last_step_at) if core.steps else None
    known: dict[str, Any] = {"running": core.running, "waiting": stats.num_waiting, "last_step_age_s": age}
    if states := client.replica_states():
        known["replicas"] = states
    if client.dead is not None:
        return json_response({"status": "dead", "cause": client.dead, **known}, 503)
    if client.unavailable:
        return json_response({"status": "restarting", "cause": client.unavailable, **known}, 503)
    if client.hung:
        return json_response({"status": "hung", "cause": client.hung, **known}, 503)
    degraded = any(replica["status"] in ("dead", "hung", "restarting") for replica in states)
    return json_response({"status": "degraded" if degraded else "ok", **known})


async def load(state: ApiState, _request: Request) -> Response:
    """The requests that the server is working on, those that wait included."""
    return json_response({"server_load": state.client.total_stats.num_open})


async def ready(readiness: Readiness) -> Response:
    """200 once the engine has produced a token."""
    await readiness.check()
    return json_response({"status": "ready"})


async def version(state: ApiState, _request: Request) -> Response:
    simulated = state.client.ready.simulated
    return json_response(
        {"version": metadata.version("redline-llm"), **({"simulated": simulated} if simulated else {})}
    )


async def openapi(state: ApiState, _request: Request) -> Response:
    return json_response(openapi_document(state.options.root_path))


async def metrics(registry: CollectorRegistry) -> Response:
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


async def reset_prefix_cache(state: ApiState, _request: Request) -> Response:
    blocks = await state.client.call_utility("reset_prefix_cache")
    return json_response({"success": True, "forgotten_blocks": blocks})


WITHOUT_BODY = (health, reset_prefix_cache, cancel_response)  # that are asked with POST
