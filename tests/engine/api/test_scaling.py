"""POST /scale: what it takes, and what an API process does that is not the first."""

import asyncio
from typing import Any

import pytest

from engine.api.error_responses import ApiError
from engine.api.scale_state import RemoteScaling, ScaleState
from tests.engine.api.conftest import InLoop


class Scaling:
    """In place of a ReplicaSet: keeps what it is asked for."""

    def __init__(self) -> None:
        self.state = ScaleState(0, 1)
        self.asked: list[tuple[int, float | None]] = []

    async def scale(self, target: int, drain_timeout: float | None = None) -> ScaleState:
        self.asked.append((target, drain_timeout))
        self.state = ScaleState(self.state.revision + 1, target)
        return self.state


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "data_parallel_size", "data_parallel_size"),
        ({"data_parallel_size": 0}, "data_parallel_size", ">= 1"),
        ({"data_parallel_size": -1}, "data_parallel_size", ">= 1"),
        ({"data_parallel_size": 65}, "data_parallel_size", "<= 64"),
        ({"data_parallel_size": 10**30}, "data_parallel_size", ""),
        ({"data_parallel_size": "two"}, "data_parallel_size", "int"),
        ({"data_parallel_size": 2, "drain_timeout": -1}, "drain_timeout", ">= 0"),
        ({"data_parallel_size": 2, "drain_timeout": "soon"}, "drain_timeout", "float"),
    ],
)
async def test_wrong_fields_are_named(server: InLoop, body: dict[str, Any], field: str, words: str):
    server.state.scaling = scaling = Scaling()
    error = await server.refusal("/scale", body)
    assert error["param"] == field
    assert words in error["message"]
    assert not scaling.asked


async def test_what_was_asked_for_is_passed_on(server: InLoop):
    server.state.scaling = scaling = Scaling()
    state = await server.post("/scale", data_parallel_size=2)
    assert (state["revision"], state["data_parallel_size"], state["timed_out"], state["error"]) == (1, 2, 0, None)
    await server.post("/scale", data_parallel_size=1, drain_timeout=2.5)
    await server.post("/scale", data_parallel_size=1, drain_timeout=0)
    assert scaling.asked == [(2, None), (1, 2.5), (1, 0.0)]
    assert (await server.http.get("/scale")).json()["revision"] == 3


async def test_a_server_whose_replicas_stay_refuses(server: InLoop):
    error = await server.refusal("/scale", {"data_parallel_size": 2})
    assert error["message"] == "the number of replicas of this server can't be changed"


async def test_the_first_process_is_asked_and_answers():
    asked: list[tuple[int, int, float | None]] = []
    scaling = RemoteScaling(3, ScaleState(5, 1), lambda *request: asked.append(request))
    first, second = asyncio.ensure_future(scaling.scale(2, 1.5)), asyncio.ensure_future(scaling.scale(4))
    await asyncio.sleep(0)
    assert asked == [(1, 2, 1.5), (2, 4, None)]
    scaling.state_changed(ScaleState(6, 7, "", (2, 1)))  # of another process
    await asyncio.sleep(0)
    assert not first.done()
    for number, target in ((1, 2), (2, 4)):
        scaling.state_changed(ScaleState(6 + number, target, "", (3, number)))
    assert [(one.revision, one.target) for one in await asyncio.gather(first, second)] == [(7, 2), (8, 4)]
    assert scaling.state.target == 4


async def test_a_first_process_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.api.scale_state.ANSWER_S", 0.0)
    scaling = RemoteScaling(3, ScaleState(5, 1), lambda *_: None)
    with pytest.raises(ApiError, match="the server's first process does not answer; try again") as caught:
        await scaling.scale(2)
    assert caught.value.status == 503
