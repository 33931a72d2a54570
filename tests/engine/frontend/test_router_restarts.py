"""Replicas whose core was started again after it had died."""

import pytest

from engine.errors import EngineDeadError
from engine.frontend.core_client import CoreClient
from tests.engine.fake_executor import expected_tokens
from tests.engine.frontend.fleet import Fleet

LONG = [7] * 40  # ten blocks


async def test_a_replica_that_is_started_again_serves_and_has_cached_nothing():
    fleet = Fleet(2)
    first = fleet.place(fleet.add(LONG))
    fleet.run()
    running = fleet.add([*LONG, 1], max_tokens=20)
    while not fleet.take(running):
        fleet.turn()
    assert fleet.place(running) == first
    fleet.kill(first)
    with pytest.raises(EngineDeadError, match="it was killed"):
        assert not running.is_open
    fleet.restart(first)
    assert [one["status"] for one in map(CoreClient.health, fleet.router.cores)] == ["ok", "ok"]
    assert fleet.router.cores[first].total_stats.core.generation_tokens == 0
    streams = [fleet.add([number] * 8) for number in range(4)]
    assert {fleet.place(stream) for stream in streams} == {0, 1}
    fleet.run()
    assert [fleet.take(stream) for stream in streams] == [expected_tokens([number] * 8, 4) for number in range(4)]
    again = fleet.add(LONG)
    fleet.run()
    assert again.cached_tokens == [0], "its successor has cached nothing"
    assert fleet.router.total_stats.step_tokens.total > 0


async def test_a_replica_that_is_started_again_is_used_at_once_until_the_load_is_even():
    """All requests went to the other one meanwhile, which also has their prefixes cached."""
    fleet = Fleet(2, supervised=True)
    fleet.router.core_lost(0, "it was killed", restarting=True)
    meanwhile = [fleet.add([number] * 8, max_tokens=40) for number in range(8)]
    assert {fleet.place(stream) for stream in meanwhile} == {1}
    fleet.turn()
    fleet.restart(0)
    others = [fleet.add([number] * 8, max_tokens=40) for number in range(8, 15)]
    assert {fleet.place(stream) for stream in others} == {0}, "until it has as much left as the other one"
    loads = [tracker.tokens_left() for tracker in fleet.router.trackers]
    assert abs(loads[0] - loads[1]) <= 2 * 48
    evenly = [fleet.place(fleet.add([number] * 8, max_tokens=40)) for number in range(15, 25)]
    assert 4 <= evenly.count(0) <= 6
    fleet.run()
    assert all(len(fleet.take(stream)) == 40 for stream in (*meanwhile, *others))


async def test_the_last_replica_can_be_started_again_too():
    fleet = Fleet(1)
    stream = fleet.add([1])
    fleet.kill(0)
    with pytest.raises(EngineDeadError):
        fleet.add([1])
    fleet.restart(0)
    assert fleet.router.dead is None
    again = fleet.add([1])
    fleet.run()
    assert fleet.take(again) == expected_tokens([1], 4)
    with pytest.raises(EngineDeadError, match="it was killed"):
        assert not stream.is_open, "what has failed stays so"
