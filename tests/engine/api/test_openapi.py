"""The OpenAPI document: complete, resolvable, and true of what the server answers."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route

from engine.api.openapi import openapi_document
from tests.engine.api.conftest import InLoop

PROMPT = {"prompt": "hello", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
CASES: list[tuple[str, str, Any]] = [
    ("post", "/v1/completions", PROMPT),
    ("post", "/v1/completions", {**PROMPT, "logprobs": 2, "n": 2, "return_token_ids": True, "stop": ["zzz"]}),
    ("post", "/v1/completions", {**PROMPT, "stream": True}),
    ("post", "/v1/completions", {"max_tokens": 3}),
    ("post", "/v1/completions", {**PROMPT, "model": "another"}),
    ("post", "/v1/chat/completions", CHAT),
    ("post", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    ("post", "/v1/chat/completions", {**CHAT, "temperature": -1}),
    ("post", "/v1/responses", {"input": "hello", "max_output_tokens": 3}),
    ("post", "/v1/responses", {"input": "hello", "max_output_tokens": 3, "stream": True}),
    ("post", "/v1/responses", {"input": "hello", "background": True}),
    ("get", "/v1/responses/{response_id}", "resp_unknown"),
    ("delete", "/v1/responses/{response_id}", "resp_unknown"),
    ("get", "/v1/responses/{response_id}/input_items", "resp_unknown"),
    ("post", "/v1/messages", CHAT),
    ("post", "/v1/messages", {**CHAT, "stream": True}),
    ("post", "/v1/messages", {**CHAT, "max_tokens": None}),
    ("post", "/v1/messages/count_tokens", {"messages": CHAT["messages"]}),
    ("post", "/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("post", "/detokenize", {"tokens": [5, 6]}),
    ("post", "/detokenize", {"tokens": [-1]}),
    ("post", "/reset_prefix_cache", {}),
    ("post", "/v1/unload_lora_adapter", {"lora_name": "nobody"}),
    ("get", "/v1/models", None),
    ("get", "/v1/models/{model}", "fake"),
    ("get", "/v1/models/{model}", "another"),
    ("post", "/scale", {"data_parallel_size": 2}),
    ("post", "/scale", {"data_parallel_size": 0}),
    ("get", "/scale", None),
    ("get", "/health", None),
    ("get", "/ping", None),
    ("post", "/ping", {}),
    ("get", "/load", None),
    ("post", "/invocations", PROMPT),
    ("get", "/version", None),
    ("get", "/metrics", None),
    ("get", "/openapi.json", None),
]


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_all_references_resolve() -> None:
    document = openapi_document()
    schemas = document["components"]["schemas"]
    found = set(references(document))
    assert len(found) > 10
    for reference in found:
        name = re.fullmatch(r"#/components/schemas/(\w+)", reference)
        assert name is not None, reference
        assert name[1] in schemas, reference
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)


def test_every_route_of_the_server_is_described(server: InLoop) -> None:
    served = {
        (method.lower(), route.path.replace(":path", ""))
        for route in server.app.routes
        if isinstance(route, Route) and route.include_in_schema  # pages are not
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {(method, path) for path, methods in openapi_document()["paths"].items() for method in methods}
    assert described == served


@pytest.mark.parametrize(("method", "path", "body"), CASES)
async def test_answers_are_as_described(server: InLoop, method: str, path: str, body: Any) -> None:
    if "{" in path:
        answer = await server.http.request(method, re.sub(r"\{\w+\}", body, path))
    else:
        answer = await server.http.request(method, path, json=body)
    check_described(answer, method, path)


def check_described(answer: httpx.Response, method: str, path: str) -> None:
    """Assert that the document has the answer's status and media type, and that its body is of the schema."""
    document = openapi_document()
    responses = document["paths"][path][method]["responses"]
    kind = answer.headers["content-type"].partition(";")[0]
    described = responses[str(answer.status_code)]["content"]
    assert kind in described
    value = answer.json() if kind == "application/json" else answer.text
    validator = Draft202012Validator({**described[kind]["schema"], "components": document["components"]})
    assert [error.message for error in validator.iter_errors(value)] == []
