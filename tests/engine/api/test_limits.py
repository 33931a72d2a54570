"""Limits of a request, each with its field and its flag; and a queue that grows no further."""

import asyncio
import time
from typing import Any

import httpx
import pytest

from engine.api.app import create_app
from engine.api.error_responses import ApiError
from engine.api.http_options import HttpOptions, Limits
from engine.api.limits import check_queue
from engine.api.state import ApiState
from engine.frontend.front_end_stats import Board
from tests.engine.api.conftest import in_loop
from tests.engine.frontend.fleet import Fleet

CHAT = [{"role": "user", "content": "hi"}]
LIMITS = Limits(max_prompts=3, max_n=2, max_stop=2, max_stop_token_ids=4)


@pytest.mark.parametrize(
    ("body", "param", "flag"),
    [
        ({"prompt": ["a"] * 4}, "prompt", "--max-prompts"),
        ({"prompt": [[1]] * 4}, "prompt", "--max-prompts"),
        ({"prompt": ["a"] * 2, "n": 2}, "n", "--max-prompts"),
        ({"prompt": "a", "n": 3}, "n", "--max-n"),
        ({"prompt": "a", "stop": ["x"] * 3}, "stop", "--max-stop"),
        ({"prompt": "a", "stop": "x" * 5000}, "stop", "4,096"),
        ({"prompt": "a", "stop_token_ids": [1] * 5}, "stop_token_ids", "--max-stop-token-ids"),
        ({"prompt": "a" * 2000}, "prompt", "--max-prompt-bytes"),
        ({"prompt": ["a", "é" * 400]}, "prompt", "800 bytes"),
        ({"messages": CHAT * 129}, "messages", "--max-model-len"),
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, "messages", "--max-prompt-bytes"),
        ({"messages": CHAT, "n": 3}, "n", "--max-n"),
        ({"messages": CHAT, "stop": ["x"] * 3}, "stop", "--max-stop"),
    ],
)
async def test_beyond_a_limit_the_field_and_the_flag_are_named(body: dict[str, Any], param: str, flag: str):
    async with in_loop(options=HttpOptions(limits=LIMITS)) as server:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        error = await server.refusal(path, body)
        assert error["param"] == param
        assert flag in error["message"]
        assert not server.core.has_work


async def test_at_the_limits_requests_are_served():
    async with in_loop(options=HttpOptions(limits=LIMITS)) as server:
        body = {"prompt": ["a"] * 3, "stop": ["x", "y"], "stop_token_ids": [3, 4, 5, 6], "max_tokens": 1}
        assert len((await server.post("/v1/completions", **body))["choices"]) == 3
        assert len((await server.post("/v1/completions", prompt=[1, 2, 3, 4, 5], n=2, max_tokens=1))["choices"]) == 2
        text = "a" * 100 + "<290>" * 25
        answer = await server.post("/v1/completions", prompt=text, max_tokens=1)
        assert answer["usage"]["prompt_tokens"] == 125, "five bytes a token are within the limit"


async def test_the_limit_of_a_text_can_be_given():
    async with in_loop(options=HttpOptions(limits=Limits(max_prompt_bytes=10))) as server:
        for path, body in (
            ("/v1/completions", {"prompt": "a" * 11}),
            ("/tokenize", {"prompt": "a" * 11}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 11}]}),
            ("/tokenize", {"messages": [{"role": "user", "content": "a" * 11}]}),
        ):
            error = await server.refusal(path, body)
            assert "11 bytes" in error["message"]
            assert "--max-prompt-bytes" in error["message"]
        assert (await server.post("/v1/completions", prompt="a" * 10, max_tokens=1))["usage"]["prompt_tokens"] == 10


async def test_rendered_chats_are_limited_too():
    template = "{% for message in messages %}{{ message.content * 100 }}{% endfor %}"
    async with in_loop(template=template) as server:
        error = await server.refusal("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 10}]})
        assert "1,000 bytes" in error["message"]


async def test_a_long_conversation_is_rendered_beside_the_loop():
    """A template that takes long must not hold up the others: the loop gets its turns while it runs."""
    template = "{% for i in range(300) %}{% for j in range(1000) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    async with in_loop(template=template, max_model_len=8192, num_blocks=4097) as server:
        pauses: list[float] = []

        async def watch() -> None:
            while True:
                before = time.monotonic()
                await asyncio.sleep(0)
                pauses.append(time.monotonic() - before)

        watching = asyncio.ensure_future(watch())
        began = time.monotonic()
        messages = [{"role": "user", "content": "a" * 5000}]
        answer = await server.post("/v1/chat/completions", messages=messages, max_tokens=1)
        took = time.monotonic() - began
        watching.cancel()
        assert answer["usage"]["prompt_tokens"] == 5000
        assert len(pauses) > 20, f"the loop stood still for most of {took:.1f} s"


async def test_a_full_queue_answers_503_and_says_when_to_come_again():
    async with in_loop(options=HttpOptions(limits=Limits(max_queue=1)), max_num_seqs=2) as server:
        body = {"prompt": [1, 2, 3], "max_tokens": 60, "ignore_eos": True}
        under_way = [asyncio.ensure_future(server.post("/v1/completions", **body)) for _ in range(3)]
        await until(lambda: server.client.total_stats.live == 3)
        for path, more in (
            ("/v1/completions", body),
            ("/v1/chat/completions", {"messages": CHAT}),
            ("/v1/completions", {**body, "stream": True}),
        ):
            answer = await server.http.post(path, json=more)
            assert answer.status_code == 503
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            error = answer.json()["error"]
            assert error["code"] == "queue_full"
            assert "--max-queue" in error["message"]
        answers = await asyncio.gather(*under_way)
        assert [one["usage"]["completion_tokens"] for one in answers] == [60] * 3, "those it had are served"
        await server.post("/v1/completions", prompt=["a"] * 3, max_tokens=1)
        assert (await server.http.post("/v1/completions", json={"prompt": ["a"] * 4})).status_code == 503
        assert server.client.total_stats.live == 0


async def test_without_a_queue_what_finds_a_slot_is_served():
    async with in_loop(options=HttpOptions(limits=Limits(max_queue=0)), max_num_seqs=2) as server:
        body = {"prompt": [1, 2, 3], "max_tokens": 30, "ignore_eos": True}
        answers = await asyncio.gather(*(server.http.post("/v1/completions", json=body) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503]


async def test_requests_that_wait_for_a_replica_are_counted_once():
    boards = [Board(2), Board(2)]
    fleet = Fleet(2, boards=boards, supervised=True)
    state = ApiState(fleet.router, ("fake",))
    transport = httpx.ASGITransport(app=create_app(state))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

        async def counted() -> list[float]:
            health, load = (await http.get("/health")).json(), (await http.get("/load")).json()
            metrics = (await http.get("/metrics")).text
            name = 'vllm:num_requests_waiting{model_name="fake"} '
            [waiting] = [line for line in metrics.splitlines() if line.startswith(name)]
            return [health["waiting"], load["server_load"], float(waiting.removeprefix(name))]

        for number in range(2):
            fleet.router.core_lost(number, "it was killed", restarting=True)
        held = [fleet.add([1]), fleet.add([2])]
        assert await counted() == [2, 2, 2]
        boards[0].stats[1].held = 3  # of another front end
        assert await counted() == [5, 5, 5]
        check_queue(fleet.router, Limits(max_queue=6), 1)
        with pytest.raises(ApiError, match="5 waiting, at most 5 allowed"):
            check_queue(fleet.router, Limits(max_queue=5), 1)
        boards[0].stats[1].held = 0
        held.pop().close()
        assert await counted() == [1, 1, 1]
        fleet.restart(1)
        assert await counted() == [0, 1, 0], "it is with a core, which has not reported it yet"
        fleet.run()
        assert len(fleet.take(held[0])) == 4
        assert await counted() == [0, 0, 0]


async def until(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")
