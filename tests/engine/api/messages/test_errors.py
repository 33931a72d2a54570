"""Errors of /v1/messages: what is refused, and the form of all errors."""

import asyncio
from typing import Any

import anthropic
import httpx2
import pytest

from engine.api.http_options import HttpOptions, Limits
from tests.engine.api.conftest import TEMPLATE as PLAIN_TEMPLATE
from tests.engine.api.conftest import in_loop
from tests.engine.api.messages.api_client import (
    ASKED,
    PATH,
    THINKS,
    TOOLS,
    USER,
    WEATHER,
    check_error,
    client,
    events_of,
    refusal,
)
from tests.engine.api.responses.test_responses import served
from tests.engine.api.test_tools import TEMPLATE

SHAPE = {"type": "json_schema", "schema": {"type": "object"}}
OPEN = {"type": "tool_use", "id": "a", "name": "b", "input": {}}


@pytest.mark.parametrize(
    ("template", "fields", "named"),
    [
        (PLAIN_TEMPLATE, {"thinking": {"type": "adaptive"}}, "thinking"),
        (TEMPLATE, {"thinking": {"type": "disabled"}}, "thinking.type"),
        (THINKS, {"thinking": {"type": "between_tools"}}, "thinking.type"),
        (THINKS, {"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens must lie in 0.."),
        (THINKS, {"thinking": {"type": "enabled", "budget_tokens": 9}, "output_config": {"format": SHAPE}},
         "thinking.budget_tokens can't be used with output_config.format"),
        (THINKS, {"thinking": {"type": "enabled", "budget_tokens": "many"}}, "thinking.budget_tokens"),
        (THINKS, {"thinking": {"type": "disabled", "display": "omitted"}}, "thinking.display"),
        (THINKS, {"thinking": {"type": "adaptive", "display": "all"}}, "thinking.display"),
        (THINKS, {"thinking": {"type": "adaptive"}, "tools": TOOLS, "tool_choice": {"type": "any"}}, "tool_choice"),
    ],
)  # fmt: skip
async def test_thinking_that_the_model_does_not_have_is_refused(template: str, fields: Any, named: str):
    async with in_loop(HttpOptions(), template, script="x", max_model_len=2048) as server:
        assert named in await refusal(server, ASKED | fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"container": "x"}, "container"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"n": 2}, "n is not supported"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        ({"messages": [USER, {"role": "assistant", "content": [OPEN]}]},
         "messages: the last message has a tool_use"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]"),
        ({"tools": [{"name": "f", "input_schema": {"type": "x"}}], "tool_choice": {"type": "any"}}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": ["any"]}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences has 99"),
        ({"output_config": {"effort": "low"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "text", "schema": {}}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "output_config.format"),
        ({"output_config": {"task_budget": {"total": 5}}}, "output_config.task_budget"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
         "messages[0].content[0].source"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "--max-model-len"),
    ],
)  # fmt: skip
async def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], named: str):
    async with served("x") as server:
        assert named in await refusal(server, ASKED | fields)
        assert not server.core.has_work
        with pytest.raises(anthropic.BadRequestError):
            await client(server).messages.create(**ASKED, extra_body=fields)


async def test_errors_of_the_request_have_the_form_of_the_api():
    limits = Limits(max_body_bytes=1000)
    async with in_loop(HttpOptions(api_keys=("key",), limits=limits), PLAIN_TEMPLATE) as server:
        key = {"x-api-key": "key"}
        for path in (PATH, f"{PATH}/count_tokens"):
            assert "X-API-Key" in await refusal(server, ASKED, 401, path)
            await refusal(server, ASKED, 401, path, **{"x-api-key": "other"})
            assert "'other'" in await refusal(server, {"model": "other", "messages": [USER]} | (
                {"max_tokens": 1} if path == PATH else {}
            ), 404, path, **key)  # fmt: skip
            assert "--max-body-bytes" in await refusal(server, {"system": "x" * 2000}, 413, path, **key)
            for content, kind, status in ((b"{", "application/json", 400), (b"{}", "text/plain", 415)):
                answer = await server.http.post(path, content=content, headers=key | {"content-type": kind})
                assert answer.status_code == status
                check_error(answer.json(), status)
            answer = await server.http.get(path, headers=key)
            assert answer.status_code == 405
            check_error(answer.json(), 405)
        answer = await server.http.post(f"{PATH}/batches", json={}, headers=key)
        assert answer.status_code == 404
        check_error(answer.json(), 404)
        with pytest.raises(anthropic.AuthenticationError):
            await client(server, "wrong").messages.create(**ASKED)
        with pytest.raises(anthropic.NotFoundError):
            await client(server).messages.create(**ASKED | {"model": "other"})


async def test_the_key_of_either_header():
    async with in_loop(HttpOptions(api_keys=("key", "two"), limits=Limits()), TEMPLATE) as server:
        asked: Any = {"model": "fake", "messages": [USER], "max_tokens": 2}
        assert (await client(server).messages.create(**asked)).stop_reason == "max_tokens"
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server.app))
        bearer = anthropic.AsyncAnthropic(base_url="http://test", auth_token="two", http_client=http, max_retries=0)
        assert (await bearer.messages.create(**asked)).stop_reason == "max_tokens"
        for version in ("2023-06-01", "2099-01-01"):
            answer = await server.http.post(
                PATH, json=asked, headers={"x-api-key": "key", "anthropic-version": version}
            )
            assert answer.status_code == 200


async def test_a_server_with_too_much_to_do():
    limits = Limits(max_queue=0, max_requests_per_key=2)
    options = HttpOptions(api_keys=("one", "two"), limits=limits)
    async with in_loop(options, PLAIN_TEMPLATE, max_num_seqs=1, script="x" * 100) as server:
        asked = ASKED | {"max_tokens": 100}
        running = asyncio.ensure_future(client(server, "one").messages.create(**asked))
        while server.client.stats.live < 1:
            await asyncio.sleep(0)
        with pytest.raises(anthropic.OverloadedError, match="the queue is full") as full:
            await client(server, "two").messages.create(**asked)
        assert full.value.status_code == 529
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        check_error(full.value.response.json(), 529)
        assert (await running).stop_reason == "max_tokens"
    options = HttpOptions(api_keys=("one",), limits=Limits(max_requests_per_key=1))
    async with in_loop(options, PLAIN_TEMPLATE, script="x" * 100) as server:
        running = asyncio.ensure_future(client(server, "one").messages.create(**asked))
        while server.client.stats.live < 1:
            await asyncio.sleep(0)
        with pytest.raises(anthropic.RateLimitError, match="--max-requests-per-key") as limited:
            await client(server, "one").messages.create(**asked)
        check_error(limited.value.response.json(), 429)
        await running


async def test_a_death_of_the_engine():
    async with served("x" * 300) as server:
        read: list[str] = []

        async def read_on() -> None:
            async for event in await client(server).messages.create(**ASKED, stream=True):
                read.append(event.type)

        reading = asyncio.ensure_future(read_on())
        while not server.app.state.prompts:
            await asyncio.sleep(0)
        for _ in range(100):  # some tokens
            await asyncio.sleep(0)
        server.client.fail_all("it is over")
        with pytest.raises(anthropic.APIStatusError, match="it is over"):
            await reading
        assert read[:2] == ["message_start", "content_block_start"]
        assert "message_delta" not in read
        with pytest.raises(anthropic.InternalServerError, match="it is over") as caught:
            await client(server).messages.create(**ASKED)
        assert caught.value.status_code == 503
        check_error(caught.value.response.json(), 503)


async def test_an_error_event_is_the_last_one():
    async with served("x" * 300) as server:
        posting = asyncio.ensure_future(server.http.post(PATH, json=ASKED | {"stream": True}))
        while not server.client.stats.live:
            await asyncio.sleep(0)
        server.client.fail_all("it is over")
        *_, last = events_of((await posting).text)
        check_error(last, 503)
