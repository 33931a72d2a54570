"""Calls of all replicas: done by all or by none, whatever hangs, and requests meanwhile are none the worse."""

import asyncio
from concurrent.futures import Future

import pytest

from engine.errors import EngineDeadError, RequestError
from engine.frontend import replica_calls as calls
from engine.frontend.streams import RequestStream
from engine.messages import Hung
from tests.engine.fake_executor import expected_tokens
from tests.engine.frontend.fleet import Fleet
from tests.engine.frontend.test_router import call
from tests.virtual_time import in_virtual_time


class Stopped:
    """A replica whose process stands still: what it is sent waits until it goes on."""

    def __init__(self, fleet: Fleet, number: int):
        self.transport = fleet.transports[number]
        self.receive = self.transport.receive
        self.waiting: list[bytes] = []
        self.transport.receive = self.waiting.append

    def go_on(self) -> None:
        assert self.receive is not None
        self.transport.receive = self.receive
        for data in self.waiting:
            self.receive(data)


async def settle(fleet: Fleet) -> None:
    for _ in range(20):
        fleet.turn()
        await asyncio.sleep(0)


async def turn_until_done(fleet: Fleet, call: "asyncio.Future[int]") -> None:
    while not call.done():
        fleet.turn()
        await asyncio.sleep(calls.PATIENCE_S / 50)


@pytest.mark.parametrize("how", ["stopped", "hung before", "hung meanwhile"])
@in_virtual_time
async def test_a_load_does_not_wait_for_a_replica_that_hangs_and_is_taken_back(how: str):
    fleet = Fleet(2)
    stopped = Stopped(fleet, 1)
    if how == "hung before":
        fleet.say(1, Hung("a step takes long"))
    loading = asyncio.ensure_future(fleet.router.call_utility("load_adapter", name="french", path="one"))
    await asyncio.sleep(0)
    if how == "hung meanwhile":
        fleet.say(1, Hung("a step takes long"))
    await turn_until_done(fleet, loading)
    with pytest.raises(EngineDeadError, match="replica 1 doesn't answer" if how == "stopped" else "replica 1 hangs"):
        await loading
    assert await call(fleet, "adapters") == {}
    stopped.go_on()
    await settle(fleet)
    assert [core._adapters.names() for core in fleet.cores] == [{}, {}], "also where it was loaded late"
    fleet.say(1, Hung(""))
    await call(fleet, "load_adapter", name="french", path="one")
    assert await call(fleet, "adapters") == {"french": "one"}


@in_virtual_time
async def test_a_load_that_takes_long_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    fleet = Fleet(2)
    done: Future[int] = Future()
    monkeypatch.setattr(fleet.workers[1], "call", lambda *_: done)
    loading = asyncio.ensure_future(fleet.router.call_utility("load_adapter", name="french", path="one"))
    for _ in range(300):
        fleet.turn()
        await asyncio.sleep(calls.PATIENCE_S / 50)
    assert not loading.done()
    done.set_result(1)
    await turn_until_done(fleet, loading)
    assert loading.result() == 0


@in_virtual_time
async def test_an_unload_does_not_wait_for_a_replica_that_hangs_and_nothing_is_unloaded():
    fleet = Fleet(2)
    await call(fleet, "load_adapter", name="french", path="one")
    stopped = Stopped(fleet, 1)
    with pytest.raises(EngineDeadError, match="replica 1 doesn't answer"):
        await call(fleet, "unload_adapter", name="french")
    stopped.go_on()
    await settle(fleet)
    streams = [fleet.add([number], adapter="french") for number in range(2)]
    fleet.run()
    assert [fleet.take(stream) for stream in streams] == [expected_tokens([number], 4) for number in range(2)]


@in_virtual_time
async def test_requests_while_an_unload_is_refused_by_another_replica_are_served():
    fleet = Fleet(2)
    await call(fleet, "load_adapter", name="french", path="one")
    busy = fleet.add([1], max_tokens=50, adapter="french")
    fleet.turn()
    unloading = asyncio.ensure_future(fleet.router.call_utility("unload_adapter", name="french"))
    others = []
    while not unloading.done():
        others.append(fleet.add([len(others) % 40, 7], adapter="french"))
        fleet.turn()
        await asyncio.sleep(0)
    with pytest.raises(RequestError.__base__, match=r"request\(s\) still use 'french'"):
        await unloading
    await settle(fleet)
    fleet.run()
    assert {fleet.place(one) for one in (busy, *others)} == {0, 1}
    for number, stream in enumerate(others):
        assert fleet.take(stream) == expected_tokens([number % 40, 7], 4)


@in_virtual_time
async def test_a_request_that_can_not_begin_again_elsewhere_fails_alone(monkeypatch: pytest.MonkeyPatch):
    fleet = Fleet(2, routing="least-loaded")
    streams = [fleet.add([number] * 3) for number in range(4)]
    unlucky = next(stream for stream in streams if fleet.place(stream) == 0)
    submit = fleet.router.cores[1].submit

    def picky(stream: RequestStream) -> None:
        if stream is unlucky:
            raise OverflowError("no")
        submit(stream)

    monkeypatch.setattr(fleet.router.cores[1], "submit", picky)
    fleet.kill(0)
    fleet.run()
    with pytest.raises(RequestError.__base__, match="could not be retried elsewhere"):
        fleet.take(unlucky)
    for number, stream in enumerate(streams):
        if stream is not unlucky:
            assert fleet.take(stream) == expected_tokens([number] * 3, 4)
    assert fleet.router.total_stats.live == 0
