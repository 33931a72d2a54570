"""What clients get wrong is answered with 400 and its cause, on every route, and never with 500."""

import asyncio
import json
import logging
from typing import Any

import openai
import pytest

from engine.api.http_server import HttpServer
from engine.api.ports import bind
from engine.api.render import DONE, Chunks
from engine.api.state import ApiState
from tests.engine.api.conftest import InLoop

ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)
DEEP = b"[" * 100_000 + b"]" * 100_000
CHAT = [{"role": "user", "content": "hi"}]
LONG = "a" * 200  # tokens; the server's model has 128


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"\xff", "UTF-8"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"\xc3": 1}', "UTF-8"),
        (b'{"other": {"x": "\xe6\x97"}}', "UTF-8"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b'{"model": "\\udc00 and more text"}', "surrogate"),
        (b'{"other": ' + DEEP + b"}", "nested"),
        (b'{"model": "a"]', "JSON"),
        (b"", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'{"model": NaN}', "JSON"),
    ],
)
async def test_bodies_that_cannot_be_read(server: InLoop, caplog: pytest.LogCaptureFixture, body: bytes, said: str):
    for path in ROUTES:
        error = await server.refusal(path, body)
        assert error["type"] == "invalid_request_error"
        assert said in error["message"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": [1] * 200}),
        ("/v1/completions", {"prompt": LONG * 1000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/chat/completions", {"messages": CHAT * 200}),
        ("/v1/responses", {"input": LONG}),
    ],
)
async def test_clients_recognize_prompts_that_are_too_long(server: InLoop, path: str, body: dict[str, Any]):
    """LangChain reads the code, LiteLLM the words."""
    error = await server.refusal(path, body)
    assert error["code"] == "context_length_exceeded"
    assert "this model's maximum context length is 128 tokens" in error["message"]
    assert "prompt is too long" in error["message"]


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/completions", "prompt", '{"prompt": [#]}'),
        ("/v1/completions", "prompt", '{"prompt": [[1], [#]]}'),
        ("/v1/completions", "n", '{"prompt": "a", "n": #}'),
        ("/v1/completions", "max_tokens", '{"prompt": "a", "max_tokens": #}'),
        ("/v1/completions", "min_tokens", '{"prompt": "a", "min_tokens": #}'),
        ("/v1/completions", "logprobs", '{"prompt": "a", "logprobs": #}'),
        ("/v1/completions", "top_k", '{"prompt": "a", "top_k": #}'),
        ("/v1/completions", "temperature", '{"prompt": "a", "temperature": #}'),
        ("/v1/completions", "priority", '{"prompt": "a", "priority": #}'),
        ("/v1/completions", "stop_token_ids", '{"prompt": "a", "stop_token_ids": [#]}'),
        ("/v1/completions", "logit_bias", '{"prompt": "a", "logit_bias": {"1": #}}'),
        ("/v1/completions", "logit_bias", '{"prompt": "a", "logit_bias": {"#": 1}}'),
        (
            "/v1/chat/completions",
            "top_logprobs",
            '{"messages": [{"role": "user"}], "logprobs": true, "top_logprobs": #}',
        ),
        (
            "/v1/chat/completions",
            "max_completion_tokens",
            '{"messages": [{"role": "user"}], "max_completion_tokens": #}',
        ),
        ("/detokenize", "tokens", '{"tokens": [#]}'),
    ],
)
async def test_numbers_beyond_64_bits(server: InLoop, path: str, field: str, body: str):
    for number in ("1" + "0" * 23, "-1" + "0" * 23, str(2**63), str(-(2**63) - 1), "9" * 5000):
        error = await server.refusal(path, body.replace("#", number).encode())
        assert (error["param"] or "").startswith(field), error
        assert len(error["message"]) <= 2000
    assert not server.core.has_work


async def test_a_huge_seed_is_a_seed_or_refused(server: InLoop):
    for seed in (2**63, -(2**63), 2**64 - 1):
        await server.post("/v1/completions", prompt="a", seed=seed, max_tokens=1)
    assert (await server.refusal("/v1/completions", {"prompt": "a", "seed": 10**23}))["param"] == "seed"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ("/v1/chat/completions", {"messages": CHAT, "stream_options": {"include_usage": False}}, "stream_options"),
        ("/v1/chat/completions", {"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "max_tokens": 4, "max_completion_tokens": 5},
            "max_completion_tokens",
        ),
        ("/v1/completions", {"prompt": "a", "max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ("/v1/completions", {"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"1_0": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"١": 1}}, "logit_bias"),
    ],
)
async def test_fields_that_contradict_or_have_the_wrong_form(server: InLoop, path: str, body: Any, param: str):
    assert (await server.refusal(path, body))["param"] == param
    assert not server.core.has_work


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v1/completions", 405, "POST"),
        ("PUT", "/v1/chat/completions", 405, "POST"),
        ("HEAD", "/tokenize", 405, "POST"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("DELETE", "/v1/models", 405, "GET, HEAD"),
        ("BREW", "/version", 405, "GET, HEAD"),
        ("GET", "/v1/nothing", 404, None),
        ("BREW", "/", 405, "GET, HEAD"),
        ("GET", "/%ff%00/%F0%9F%98%80", 404, None),
    ],
)
async def test_unknown_paths_and_methods(server: InLoop, method: str, path: str, status: int, allow: str | None):
    answer = await server.http.request(method, path)
    assert (answer.status_code, answer.headers.get("allow")) == (status, allow)
    if method != "HEAD":
        assert answer.json()["error"]["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/v1/models"])
async def test_head_is_answered_where_get_is(server: InLoop, path: str):
    assert (await server.http.head(path)).status_code == 200


async def test_the_request_id_is_on_every_answer(server: InLoop):
    calls: list[tuple[str, str, Any]] = [
        ("GET", "/health", None),
        ("GET", "/nothing", None),
        ("GET", "/v1/completions", None),
        ("POST", "/v1/completions", {}),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1, "stream": True}),
    ]
    for method, path, body in calls:
        answer = await server.http.request(method, path, json=body, headers={"X-Request-Id": "mine 1"})
        assert answer.headers.get_list("x-request-id") == ["mine 1"], path
        first, second = [(await server.http.request(method, path, json=body)).headers["x-request-id"] for _ in "ab"]
        assert first != second
    odd = await server.http.get("/health", headers={"X-Request-Id": "x" * 5000})
    assert len(odd.headers["x-request-id"]) < 100


async def test_a_failure_of_the_server_says_nothing_of_its_insides(
    server: InLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    async def fail(*_: object, **__: object) -> None:
        raise KeyError("/srv/secret/path")

    monkeypatch.setattr(server.client, "call_utility", fail)
    answer = await server.http.post("/reset_prefix_cache", json={}, headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "KeyError" not in answer.text
    assert "secret" not in answer.text
    assert "/srv/secret/path" in caplog.text, "the log has the cause"
    assert "mine" in caplog.text


async def test_a_failure_within_a_stream_is_an_error_to_openai_s_client(
    server: InLoop, monkeypatch: pytest.MonkeyPatch
):
    whole, seen = Chunks.render_all, []

    def fails_at_the_third(self: Chunks, deltas: Any) -> bytes:
        seen.append(deltas)
        if len(seen) == 3:
            raise ZeroDivisionError("of /srv/secret")
        return whole(self, deltas)

    monkeypatch.setattr(Chunks, "render_all", fails_at_the_third)
    stream = await server.openai.completions.create(model="fake", prompt="ab", max_tokens=9, stream=True)
    texts = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].text)

    with pytest.raises(openai.APIError, match="internal error"):
        await read()
    assert len(texts) == 2
    while server.core.has_work:
        await asyncio.sleep(0)
    assert server.client.total_stats.live == 0


async def test_an_error_event_is_the_last_event(server: InLoop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Chunks, "render_all", lambda *_: 1 / 0)
    answer = await server.http.post("/v1/completions", json={"prompt": "ab", "stream": True})
    assert DONE.decode().strip() not in answer.text
    assert set(json.loads(answer.text.removeprefix("data: "))) == {"error"}


async def test_a_client_that_leaves_within_its_body_costs_nothing(server: InLoop, caplog: pytest.LogCaptureFixture):
    sent = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    await server.app(scope, receive, send)
    assert not sent
    assert not caplog.records


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"BREW / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nho st: x\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_no_http_has_an_error_in_the_same_form(
    server: InLoop, caplog: pytest.LogCaptureFixture, data: bytes
):
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    side = HttpServer(ApiState(server.client, ("fake",)), listener)
    up = asyncio.Event()
    serving = asyncio.ensure_future(side.serve(lambda _url: up.set()))
    await up.wait()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert not caplog.records
    side.end(0.1)
    await asyncio.wait_for(serving, 10)
