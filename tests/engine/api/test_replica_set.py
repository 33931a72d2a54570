"""Which replicas a server has: whatever dies, fails to start or is not wanted, none is left over and none missing."""

import asyncio
import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from engine.api.replica_set import ReplicaSet
from engine.api.restarts import MAX_RESTARTS
from engine.errors import OutOfMemoryError
from engine.frontend.front_end_stats import Boards
from engine.frontend.replica_events import (
    DrainCanceled,
    DrainTimeout,
    ReplicaDraining,
    ReplicaEvent,
    ReplicaLost,
    ReplicaRemoved,
    ReplicaStarting,
    ReplicaUp,
)
from engine.frontend.transport import CoreAddress
from engine.messages import Ready

READY = Ready("fake", "fake", "float32", 300, 128, 4, 64, 16, 10, True)
WAIT_S = 30.0


class Core:
    """In place of an EngineCore."""

    def __init__(self) -> None:
        self.up = self.stopped = False
        self.on_death: Callable[[str], None] = lambda _: None
        self.may_start = threading.Event()

    def kill(self) -> None:
        self.stopped = True
        self.on_death("it was killed")

    def stop(self) -> None:
        self.stopped = True
        self.may_start.set()


class Engine:
    """Starts cores on the threads of a ReplicaSet; `held`: only when a test lets them."""

    def __init__(self, count: int) -> None:
        self.config: Any = SimpleNamespace(adapters=(("dutch", "/lora"),))
        self.readies = dict.fromkeys(range(count), READY)
        self.cores: dict[int, Core] = {number: Core() for number in range(count)}
        self.all = list(self.cores.values())
        self.adapters: list[Any] = []
        self.fails = self.held = False
        self.room = 64

    def address(self, replica: int, front_end: int = 0) -> CoreAddress:
        return CoreAddress(READY, f"core {replica}", f"front {front_end}")

    def watch(self, on_death: Callable[[int, str], None]) -> None:
        for number, core in self.cores.items():
            core.up, core.on_death = True, lambda cause, number=number: on_death(number, cause)

    def restart(self, replica: int, adapters: Any, on_death: Callable[[int, str], None]) -> None:
        self.adapters.append(adapters)
        core, ended = Core(), self.cores.get(replica)
        self.all.append(core)
        self.cores[replica] = core
        if ended is not None:
            ended.stop()
        if self.held:
            assert core.may_start.wait(WAIT_S)
        if self.fails or core.stopped:
            core.stopped = True
            raise OutOfMemoryError("there is too little memory")
        core.on_death = lambda cause: on_death(replica, cause)
        self.readies[replica] = READY
        core.up = True

    def check_room(self, count: int) -> None:
        if count > self.room:
            raise OutOfMemoryError("there is too little memory")

    def add(self, replica: int, _count: int, adapters: Any, on_death: Callable[[int, str], None]) -> None:
        self.restart(replica, adapters, on_death)

    @property
    def running(self) -> int:
        return sum(core.up and not core.stopped for core in self.all)


class Server:
    """A ReplicaSet, with a front end that has no requests unless it is `busy`; `others` are further ones."""

    def __init__(self, count: int, limit: int | None = None, others: tuple[int, ...] = ()) -> None:
        self.engine = Engine(count)
        self.events: list[ReplicaEvent] = []
        self.busy = False
        self.died: list[str] = []
        self.replicas = ReplicaSet(self.engine, Boards(1), limit)  # type: ignore[arg-type]
        self.router: Any = SimpleNamespace(on_drained=None, call_utility=self._call)
        processes = SimpleNamespace(announce=lambda _: None, announce_state=lambda _: None, running=list(others))
        self.replicas.open(self, processes, self.died.append)  # type: ignore[arg-type]

    async def _call(self, method: str) -> dict[str, str]:
        assert method == "adapters"
        return {"french": "/other"}

    def apply(self, event: ReplicaEvent) -> None:
        self.events.append(event)
        if isinstance(event, ReplicaDraining) and not self.busy:
            self.router.on_drained(event.replica, event.drain)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await asyncio.sleep(0.002)

    def seen(self, kind: type[Any]) -> list[int]:
        return [event.replica for event in self.events if isinstance(event, kind)]


async def test_replicas_are_added_and_removed_and_numbers_are_used_again():
    server = Server(1)
    state = await server.replicas.scale(3)
    assert (state.revision, state.target) == (1, 3)
    await server.until(lambda: server.engine.running == 3 and len(server.seen(ReplicaUp)) == 2)
    assert server.seen(ReplicaStarting) == [1, 2]
    assert server.engine.adapters == [(("french", "/other"),)] * 2, "they have what the others have"
    await server.replicas.scale(1)
    await server.until(lambda: sorted(server.seen(ReplicaRemoved)) == [1, 2])
    assert server.engine.running == 1
    await server.replicas.scale(2)
    await server.until(lambda: server.engine.running == 2)
    assert server.seen(ReplicaStarting) == [1, 2, 1]


async def test_more_than_there_are_numbers_for_are_refused_until_the_others_have_ended():
    server = Server(40)
    await server.replicas.scale(1)
    state = await server.replicas.scale(64)
    assert state.error == "64 replicas and 39 ending ones exceed 64: wait until these have ended"
    assert (state.target, state.revision) == (1, 2)
    await server.until(lambda: len(server.seen(ReplicaRemoved)) == 39)
    assert not (await server.replicas.scale(64)).error
    await server.until(lambda: server.engine.running == 64)


async def test_a_replica_that_can_not_be_started_is_an_error_and_the_others_stay():
    server = Server(1)
    server.engine.fails = True
    await server.replicas.scale(2)
    await server.until(lambda: bool(server.replicas.state.error))
    assert "replica 1 could not be started: there is too little memory" in server.replicas.state.error
    assert (server.replicas.state.target, server.engine.running, server.seen(ReplicaRemoved)) == (1, 1, [1])


async def test_replicas_that_do_not_fit_together_are_an_error_before_one_starts():
    server = Server(2)
    server.engine.room = 3
    state = await server.replicas.scale(6)
    assert (state.revision, state.target, state.error) == (1, 2, "there is too little memory")
    assert (len(server.engine.all), server.events) == (2, [])
    assert (await server.replicas.scale(5)).error == ""
    await server.until(lambda: server.engine.running == 5)


async def test_a_start_that_is_not_wanted_any_longer_ends():
    server = Server(1)
    server.engine.held = True
    await server.replicas.scale(2)
    await server.until(lambda: 1 in server.engine.cores)
    await server.replicas.scale(1)
    await server.until(lambda: server.seen(ReplicaRemoved) == [1])
    assert server.engine.running == 1
    assert not server.replicas.state.error


async def test_a_drain_ends_after_its_time_limit():
    server = Server(3)
    server.busy = True
    await server.replicas.scale(1, 0.01)
    await server.until(lambda: sorted(server.seen(DrainTimeout)) == [1, 2])
    drains = {event.replica: event.drain for event in server.events if isinstance(event, ReplicaDraining)}
    [cause] = {event.cause for event in server.events if isinstance(event, DrainTimeout) and event.replica == 1}
    assert "replica 1 was removed" in cause
    assert "within 0.01 s (redline scale --drain-timeout)" in cause
    assert server.engine.running == 3, "until the front ends report"
    for number, drain in drains.items():
        server.replicas.drained(0, number, drain)
    await server.until(lambda: sorted(server.seen(ReplicaRemoved)) == [1, 2])
    assert server.engine.running == 1


async def test_a_front_end_that_hangs_does_not_hold_up_a_drain_with_a_time_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.api.replica_set.DRAIN_REPORT_S", 0.0)
    server = Server(2, others=(1,))
    await server.replicas.scale(1)
    assert server.seen(ReplicaDraining) == [1]
    await server.replicas.scale(1, 0.0)  # a later command limits a drain that has begun
    await server.until(lambda: server.seen(ReplicaRemoved) == [1])
    assert server.engine.running == 1


async def test_a_draining_replica_is_taken_back_before_another_is_started():
    server = Server(3)
    server.busy = True
    await server.replicas.scale(1, 30.0)
    server.engine.room = 0  # for another start
    assert not (await server.replicas.scale(2)).error
    assert server.seen(DrainCanceled) == [1]
    assert not server.seen(ReplicaStarting)
    late = next(event.drain for event in server.events if isinstance(event, ReplicaDraining) and event.replica == 1)
    await server.replicas.scale(1)
    server.replicas.drained(0, 1, late)
    again = max(event.drain for event in server.events if isinstance(event, ReplicaDraining) and event.replica == 1)
    assert again != late
    server.engine.room = 1
    await server.replicas.scale(4)
    assert server.seen(DrainCanceled) == [1, 1, 2], "a report of an earlier drain does not count"
    await server.until(lambda: server.engine.running == 4)
    assert server.seen(ReplicaStarting) == [3]


async def test_a_front_end_that_begins_learns_what_the_others_know():
    server = Server(4)
    server.busy = server.engine.held = True
    await server.replicas.scale(3)
    server.engine.cores[1].kill()
    await server.until(lambda: server.seen(ReplicaLost) == [1])
    lost, draining = server.replicas.events()
    assert isinstance(lost, ReplicaLost)
    assert (lost.replica, lost.restarting) == (1, True)
    assert isinstance(draining, ReplicaDraining)
    assert draining.replica == 3
    addresses = server.replicas.addresses(1)
    assert [number for number, one in addresses.items() if one.to_core] == [0, 2, 3], "the core that restarts has none"
    server.replicas.drained(0, 3, draining.drain)
    assert [one.replica for one in server.replicas.events() if isinstance(one, ReplicaDraining)] == [3], "it is ending"
    await server.until(lambda: server.seen(ReplicaRemoved) == [3])
    assert not [one for one in server.replicas.events() if isinstance(one, ReplicaDraining)]
    for core in server.engine.all:
        core.may_start.set()


async def test_a_replica_that_dies_while_it_is_drained_is_not_started_again():
    server = Server(2)
    server.busy = True
    await server.replicas.scale(1)
    assert server.seen(ReplicaDraining) == [1]
    server.engine.cores[1].kill()
    await server.until(lambda: server.seen(ReplicaRemoved) == [1])
    assert [event.restarting for event in server.events if isinstance(event, ReplicaLost)] == [False]


@pytest.mark.parametrize(("count", "limit", "restarts"), [(2, None, MAX_RESTARTS), (1, None, 0), (1, 2, 2), (2, 0, 0)])
async def test_a_core_is_started_again_as_often_as_allowed(
    count: int, limit: int | None, restarts: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("engine.api.restarts.BACK_OFF_S", 0.0)
    server = Server(count, limit)
    last = count - 1
    for number in range(restarts):
        server.engine.cores[last].kill()
        await server.until(lambda expected=number + 1: server.seen(ReplicaUp) == [last] * expected)
    server.engine.cores[last].kill()
    if count == 1:
        await server.until(lambda: bool(server.died))
    else:
        await server.until(lambda: len(server.seen(ReplicaLost)) == restarts + 1)
        assert not server.died
        await server.replicas.scale(count)  # by hand, it is started again
        await server.until(lambda: server.engine.running == count)
    assert len(server.seen(ReplicaUp)) == restarts + (count > 1)


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_there_are_as_many_as_were_asked_for(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.api.restarts.BACK_OFF_S", 0.0)
    monkeypatch.setattr("engine.api.replica_set.DRAIN_REPORT_S", 0.0)
    luck, server = random.Random(seed), Server(2, 100)
    for _ in range(60):
        act = luck.random()
        running = [core for core in server.engine.cores.values() if core.up and not core.stopped]
        if act < 0.3:
            server.busy = luck.random() < 0.5
            await server.replicas.scale(luck.randint(1, 5), luck.choice((None, 0.0, 0.002)))
        elif act < 0.6 and len(running) > 1:
            luck.choice(running).kill()
        elif act < 0.7:
            server.engine.fails = luck.random() < 0.3
        await asyncio.sleep(luck.choice((0, 0, 0.003)))
    server.engine.fails = False
    await server.replicas.scale(3, 0.0)
    await server.until(lambda: server.engine.running == 3)
    await asyncio.sleep(0.05)
    assert server.engine.running == 3
    assert not server.died
