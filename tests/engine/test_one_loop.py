"""API, core, a fake worker and a client in one event loop, under a clock that the test moves: time is exact."""

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from engine.api.app import create_app
from engine.api.state import ApiState
from engine.clock import FakeClock
from engine.core.engine import EngineCore
from engine.frontend.core_client import CoreClient
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.messages import Ready, StepMessage
from tests.engine.core_driver import next_wait, resolved
from tests.engine.fake_executor import VOCABULARY, FakeExecutor, expected_tokens
from tests.engine.inline_transport import InlineTransport

STEP_S = 0.125  # powers of two: sums of them are exact
TOKEN_S = 1 / 64


def seconds_of(_step: StepMessage, tokens: int) -> float:
    return STEP_S + tokens * TOKEN_S


class Call:
    """One HTTP exchange over ASGI; every part of the answer with the time it was sent at."""

    def __init__(self, clock: FakeClock):
        self.clock = clock
        self.status = 0
        self.parts: list[tuple[float, bytes]] = []
        self.gone = asyncio.Event()

    async def run(self, app: Any, path: str, body: dict[str, Any]) -> "Call":
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            else:
                self.parts.append((self.clock.now(), message["body"]))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "scheme": "http",
        }
        await app(scope, receive, send)
        return self

    def chunks(self) -> list[tuple[float, dict[str, Any]]]:
        """Server-sent events but the last, with their times."""
        found = []
        for at, part in self.parts:
            for line in part.split(b"\n\n"):
                if line.startswith(b"data: {"):
                    found.append((at, json.loads(line[6:])))
        return found


class World:
    """Everything of a server but the sockets, in this loop."""

    def __init__(self) -> None:
        config = resolved(max_num_batched_tokens=32)
        self.clock = FakeClock()
        self.worker = FakeExecutor(self.clock, config.block_size, seconds_of)
        transport = InlineTransport()
        self.core = EngineCore(config, self.worker, self.clock, transport.from_core)
        transport.receive = self.core.receive
        ready = Ready(
            "fake", "fake", "float32", VOCABULARY, config.max_model_len, config.max_num_seqs,
            config.max_num_batched_tokens, config.block_size, config.num_blocks - 1, True,
        )  # fmt: skip
        self.client = CoreClient(ready, Tokenizer(StandInBackend(VOCABULARY)), transport, self.clock)
        self.client.open()
        self.app = create_app(ApiState(self.client, ("fake",)))

    async def settle(self) -> None:
        """Let everybody do what can be done at this moment."""
        for _ in range(50):
            await asyncio.sleep(0)
            self.core.step(self.clock.now())

    async def until(self, done: Callable[[], bool]) -> None:
        for _ in range(1000):
            await self.settle()
            if done():
                return
            wait = next_wait(self.core, self.worker, self.clock.now())
            if wait is not None:
                self.clock.advance(wait)
                self.worker.pump()
        raise AssertionError("it never came to that")

    async def serve(self, *calls: "asyncio.Task[Call]") -> None:
        await self.until(lambda: all(call.done() for call in calls))

    def post(self, path: str, **body: Any) -> "asyncio.Task[Call]":
        return asyncio.ensure_future(Call(self.clock).run(self.app, path, body))


async def test_a_streamed_completion_arrives_step_by_step_at_the_exact_times():
    world = World()
    call = world.post("/v1/completions", prompt=[1, 2, 3, 4], max_tokens=4, stream=True, return_token_ids=True)
    await world.serve(call)
    chunks = [(at, chunk) for at, chunk in call.result().chunks() if chunk["choices"]]
    prefill = STEP_S + 4 * TOKEN_S
    decode = STEP_S + TOKEN_S
    assert [at for at, _ in chunks] == [prefill + i * decode for i in range(4)]
    tokens = [token for _, chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert tokens == expected_tokens([1, 2, 3, 4], 4)
    assert call.result().parts[-1][1].endswith(b"data: [DONE]\n\n")


async def test_a_prefill_joins_the_decodes_and_delays_them_by_its_tokens_alone():
    world = World()
    first = world.post("/v1/completions", prompt=[1], max_tokens=12, stream=True)
    await world.until(lambda: len(world.worker.steps) >= 4)
    second = world.post("/v1/completions", prompt=[2] * 24, max_tokens=2, stream=True)
    await world.serve(first, second)
    times = [at for at, chunk in first.result().chunks() if chunk["choices"]]
    gaps = [round((b - a - STEP_S) / TOKEN_S) for a, b in itertools.pairwise(times)]
    assert sorted(set(gaps)) == [1, 2, 25], "alone, beside a decode, beside the whole prefill"
    assert gaps.count(25) == 1


async def test_a_client_that_leaves_frees_its_row():
    world = World()
    call = Call(world.clock)
    body = {"prompt": [1], "max_tokens": 60, "stream": True}
    task = asyncio.ensure_future(call.run(world.app, "/v1/completions", body))
    await world.until(lambda: len(call.parts) > 3)
    assert world.core.scheduler.slots.num_running == 1
    call.gone.set()
    await world.until(task.done)
    await world.until(lambda: not world.core.has_work)
    assert world.core.scheduler.slots.num_running == 0
    assert world.core.scheduler.pool.num_free == 64
    assert len(world.worker.steps) < 20


async def test_a_whole_answer_counts_its_tokens_and_hits():
    world = World()
    body = {"prompt": [7] * 12, "max_tokens": 3}
    first = world.post("/v1/completions", **body)
    await world.serve(first)
    second = world.post("/v1/completions", **body)
    await world.serve(second)
    answers = [json.loads(task.result().parts[-1][1]) for task in (first, second)]
    assert [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers] == [0, 8]
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
    assert answers[1]["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("length", [64, 100])
async def test_a_prompt_over_max_model_len_is_refused_before_the_core_sees_it(length: int):
    world = World()
    call = world.post("/v1/completions", prompt=[1] * length)
    await world.serve(call)
    assert call.result().status == 400
    assert str(length) in json.loads(call.result().parts[0][1])["error"]["message"]
    assert not world.worker.steps


async def test_the_death_of_the_core_reaches_an_open_stream_and_the_next_request():
    world = World()
    call = Call(world.clock)
    body = {"prompt": [1], "max_tokens": 60, "stream": True}
    task = asyncio.ensure_future(call.run(world.app, "/v1/completions", body))
    await world.until(lambda: len(call.parts) > 2)
    world.client.fail_all("rank 0 is gone")
    await world.until(task.done)
    assert b"rank 0 is gone" in call.parts[-1][1]
    late = world.post("/v1/completions", prompt=[1])
    await world.serve(late)
    assert late.result().status >= 500
