"""Requests to /v1/messages with Anthropic's client, for tests."""

import json
from typing import Any

import anthropic
import httpx2

from tests.engine.api.conftest import InLoop
from tests.engine.api.test_tools import SCHEMA, TEMPLATE

PATH = "/v1/messages"
USER: Any = {"role": "user", "content": "hi"}
WEATHER: Any = {"name": "get_weather", "description": "d", "input_schema": SCHEMA}
TOOLS: Any = [WEATHER, {"name": "get_time", "input_schema": {"type": "object"}}]
ASKED: dict[str, Any] = {"model": "fake", "messages": [USER], "max_tokens": 400, "stop_sequences": ["\0"]}
THINKS = TEMPLATE.replace("{% if think %}", "{% if enable_thinking %}")


def client(server: InLoop, key: str = "key", **options: Any) -> anthropic.AsyncAnthropic:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server.app))
    return anthropic.AsyncAnthropic(base_url="http://test", http_client=http, max_retries=0, api_key=key, **options)


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, whose names are their types."""
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        kind, line = event.split("\n")
        found.append(json.loads(line.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


def prompt_tokens(usage: Any) -> int:
    """All tokens of the prompt; which are cached differs between two requests."""
    return sum(usage[name] for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"))


async def refusal(server: InLoop, body: Any, status: int = 400, path: str = PATH, **headers: str) -> str:
    """The message of an error, which has the form that Anthropic's clients expect."""
    answer = await server.http.post(path, json=body, headers=headers)
    assert answer.status_code == status, answer.text
    check_error(answer.json(), status)
    assert answer.headers["request-id"] == answer.headers["x-request-id"]
    return str(answer.json()["error"]["message"])


TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def check_error(body: Any, status: int) -> None:
    assert body.keys() == {"type", "error"}
    assert body["error"].keys() == {"type", "message"}
    assert (body["type"], body["error"]["type"]) == ("error", TYPES[status])
