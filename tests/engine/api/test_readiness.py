"""/ready: a token has been produced, or it says why not."""

import asyncio
from pathlib import Path

import pytest

from engine.api import readiness
from engine.errors import RequestError
from engine.messages import Hung, encode
from tests.engine.api.conftest import InLoop
from tests.engine.api.pooling_server import pooling_server
from tests.engine.pooling_models import build


async def test_a_server_that_nobody_asked_makes_a_token_itself(server: InLoop):
    assert server.client.total_stats.core.generation_tokens == 0
    answer = await server.http.get("/ready")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    for _ in range(3):
        assert (await server.http.get("/ready")).status_code == 200
    assert server.client.total_stats.core.generation_tokens == 1, "once"


async def test_a_token_of_a_client_is_enough(server: InLoop):
    await server.post("/v1/completions", prompt="a", max_tokens=1)
    assert (await server.http.get("/ready")).status_code == 200
    assert server.client.total_stats.core.generation_tokens == 1


async def test_it_is_not_ready_while_no_token_comes(server: InLoop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readiness, "PATIENCE_S", 0.01)
    step = server.core.step
    monkeypatch.setattr(server.core, "step", lambda _now: None)
    monkeypatch.setattr(type(server.core), "has_work", property(lambda _self: False))
    error = (await server.http.get("/ready")).json()["error"]
    assert (error["code"], error["message"]) == ("not_ready", "not ready: no token has been produced yet")
    assert (await server.http.get("/ready")).status_code == 503
    assert server.client.stats.live == 1, "one probe is enough"
    monkeypatch.undo()
    monkeypatch.setattr(server.core, "step", step)
    while server.client.stats.live:
        await asyncio.sleep(0)
    assert (await server.http.get("/ready")).status_code == 200


async def test_it_is_not_ready_when_the_engine_hangs_or_is_gone(server: InLoop):
    assert (await server.http.get("/ready")).status_code == 200
    server.client.deliver(encode(Hung("rank 0 hangs")))
    error = (await server.http.get("/ready")).json()["error"]
    assert error["message"] == "not ready: rank 0 hangs"
    server.client.deliver(encode(Hung()))
    assert (await server.http.get("/ready")).status_code == 200
    server.client.fail_all("it was killed")
    answer = await server.http.get("/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "it was killed" in answer.json()["error"]["message"]


async def test_a_probe_that_fails_says_why(server: InLoop, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise RequestError("no room")

    monkeypatch.setattr(server.client, "check_fields", refuse)
    answer = await server.http.get("/ready")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "not ready: a probe failed: no room")


async def test_a_model_that_pools_is_asked_for_a_vector_once(tmp_path: Path):
    build("bert", tmp_path)
    async with pooling_server(tmp_path) as server:
        for _ in range(3):
            assert (await server.http.get("/ready")).json() == {"status": "ready"}
        assert sum(server.client.stats.finished.values()) == 1, "one probe is enough"
