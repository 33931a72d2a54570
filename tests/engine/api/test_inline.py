"""Whole servers, with the front end in the core's loop and in its own process: the same answers."""

import asyncio
import json
from typing import Any

import pytest

from engine.frontend.sampling_params import SamplingParams
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.test_app import CHAT
from tests.engine.fake_executor import expected_tokens

INLINE = frozenset({"inline-frontend"})


def without_names(answer: Any) -> Any:
    """An answer without what differs each time."""
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


async def asked(server: InLoop, path: str, body: dict[str, Any]) -> list[Any]:
    answer = await server.http.post(path, json=body)
    if not body.get("stream"):
        return [answer.status_code, without_names(answer.json())]
    assert answer.text.endswith("data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    return [answer.status_code, *map(without_names, events)]


STOP = bytes(expected_tokens(b"ab", 6)[4:6]).decode()

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "ab", "max_tokens": 6}),
    ("/v1/completions", {"prompt": ["ab", "cde"], "n": 2, "max_tokens": 6, "echo": True}),
    ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 6, "return_token_ids": True}),
    ("/v1/completions", {"prompt": "ab", "max_tokens": 20, "stop": STOP, "return_token_ids": True}),
    ("/v1/completions", {"prompt": "ab", "max_tokens": 20, "stop": STOP, "include_stop_str_in_output": True}),
    ("/v1/completions", {"prompt": "ab", "max_tokens": 6, "stop": STOP}),
    ("/v1/completions", {"prompt": "ab", "max_tokens": 500}),
    ("/v1/completions", {"prompt": "ab", "max_tokens": 20, "stop_token_ids": [expected_tokens(b"ab", 4)[-1]]}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 5}),
    ("/v1/chat/completions", {"messages": CHAT}),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_those_of_v1(stream: bool):
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    async with in_loop() as plain, in_loop(ablations=INLINE) as inline:
        for path, body in BODIES:
            body = {**body, "stream": stream, **usage}
            expected = await asked(plain, path, body)
            assert expected[0] == 200
            assert await asked(inline, path, body) == expected, body
        assert plain.client.stats.finished == inline.client.stats.finished
        assert plain.client.stats.prompt_tokens.total == inline.client.stats.prompt_tokens.total > 0
        for server in (plain, inline):
            assert server.client.total_stats.live == 0
            server.core.scheduler.check()
            assert not server.core.scheduler.requests


async def test_a_text_that_is_too_long_is_refused_in_the_same_words():
    body = {"prompt": "a" * 200, "max_tokens": 5}
    async with in_loop() as plain, in_loop(ablations=INLINE) as inline:
        first = await plain.refusal("/v1/completions", body)
        second = await inline.refusal("/v1/completions", body)
        assert first["message"] == second["message"]
        assert (await inline.post("/v1/completions", prompt="ab", max_tokens=3))["usage"]["completion_tokens"] == 3


async def test_a_client_that_leaves_leaves_nothing_behind():
    async with in_loop(ablations=INLINE) as server:
        stream = server.client.add_request([[1, 2]], SamplingParams(max_tokens=100))
        await anext(stream)
        stream.close()
        while server.core.has_work:
            await asyncio.sleep(0)
        assert not server.core.scheduler.requests
        texts: Any = server.core._inline
        assert len(texts._live) == 0
