"""Replicas that are started again, added and drained while requests come: none is lost."""

import asyncio
import random

import pytest

from engine.errors import EngineDeadError, RequestError
from engine.frontend.streams import RequestStream
from engine.grammar import Grammar
from engine.messages import Dead
from tests.engine.fake_executor import expected_tokens
from tests.engine.frontend.fleet import Fleet


def statuses(fleet: Fleet) -> list[str]:
    return [state["status"] for state in fleet.router.replica_states()]


async def test_requests_wait_while_the_only_replica_is_started_again():
    fleet = Fleet(1, supervised=True)
    before = fleet.add([1, 2])
    assert fleet.router.replicas == ()
    fleet.router.core_lost(0, "it was killed; it is restarted", restarting=True)
    assert "it was killed" in fleet.router.unavailable
    assert fleet.router.dead is None
    while_gone = fleet.add([3])
    assert fleet.router.num_held == 2, "one without output, and a new one"
    assert before.is_open
    fleet.restart(0)
    assert (fleet.router.unavailable, fleet.router.num_held) == ("", 0)
    fleet.run()
    assert fleet.take(before) == expected_tokens([1, 2], 4)
    assert fleet.take(while_gone) == expected_tokens([3], 4)


async def test_a_request_that_has_output_fails_with_the_cause():
    fleet = Fleet(1, supervised=True)
    stream = fleet.add([1], max_tokens=20)
    while not fleet.take(stream):
        fleet.turn()
    fleet.router.core_lost(0, "it was killed", restarting=True)
    with pytest.raises(EngineDeadError, match="it was killed"):
        assert not stream.is_open


async def test_the_word_of_the_core_decides_nothing():
    """Its process has not ended yet; whether it is started again follows with its end."""
    fleet = Fleet(1, supervised=True)
    fleet.say(0, Dead("a step failed"))
    held = fleet.add([1])
    assert held.is_open
    fleet.router.core_lost(0, "a step failed; it ended 2 times and is not restarted")
    assert fleet.router.dead is not None
    with pytest.raises(EngineDeadError, match="a step failed"):
        assert not held.is_open
    with pytest.raises(EngineDeadError, match="a step failed"):
        fleet.add([1])


async def test_a_request_is_tried_on_two_cores_at_most():
    fleet = Fleet(1, supervised=True)
    stream = fleet.add([1])
    fleet.router.core_lost(0, "it was killed", restarting=True)
    fleet.restart(0)
    assert stream.is_open
    fleet.router.core_lost(0, "it was killed again", restarting=True)
    with pytest.raises(EngineDeadError, match="killed again"):
        assert not stream.is_open


async def test_held_requests_are_checked_and_can_be_aborted():
    fleet = Fleet(1, supervised=True)
    fleet.router.core_lost(0, "it was killed", restarting=True)
    with pytest.raises(RequestError, match="empty"):
        fleet.add([])
    stream, other = fleet.add([1]), fleet.add([2])
    stream.close()
    assert not stream.is_open
    fleet.router.close()
    with pytest.raises(EngineDeadError):
        assert not other.is_open


async def test_the_check_of_a_grammar_waits_too():
    fleet = Fleet(1, supervised=True)
    fleet.router.core_lost(0, "it was killed", restarting=True)
    asked = asyncio.ensure_future(fleet.router.check_grammar(Grammar("regex", "0+")))
    given_up = asyncio.ensure_future(fleet.router.check_grammar(Grammar("regex", "1+")))
    for _ in range(3):
        await asyncio.sleep(0)
    given_up.cancel()
    assert not asked.done()
    fleet.restart(0)
    while not asked.done():
        await asyncio.sleep(0.001)
        fleet.turn()
    assert asked.result() == ""
    fleet.router.core_lost(0, "it was killed", restarting=True)
    lost = asyncio.ensure_future(fleet.router.check_grammar(Grammar("regex", "2+")))
    await asyncio.sleep(0)
    fleet.router.core_lost(0, "it ended 2 times and is not restarted")
    with pytest.raises(EngineDeadError, match="it was killed"):
        await lost


async def test_an_added_replica_takes_requests():
    fleet = Fleet(1, supervised=True)
    running = [fleet.add([number] * 8, max_tokens=30) for number in range(4)]
    fleet.router.core_starting(1)
    assert statuses(fleet) == ["ok", "starting"]
    fleet.grow()
    assert statuses(fleet) == ["ok", "ok"]
    added = [fleet.add([number] * 8) for number in range(4)]
    assert {fleet.place(stream) for stream in added} == {1}, "the other one has work left"
    fleet.run()
    assert [fleet.take(stream) for stream in running] == [expected_tokens([number] * 8, 30) for number in range(4)]
    assert [fleet.take(stream) for stream in added] == [expected_tokens([number] * 8, 4) for number in range(4)]
    assert fleet.router.total_stats.core.generation_tokens == 4 * 34


async def test_a_draining_replica_ends_what_it_has_and_gets_nothing_new():
    fleet = Fleet(2, supervised=True)
    drained: list[int] = []
    fleet.router.on_drained = drained.append
    streams = [fleet.add([number] * 8, max_tokens=10) for number in range(4)]
    places = [fleet.place(stream) for stream in streams]
    assert set(places) == {0, 1}
    fleet.router.drain(1)
    assert statuses(fleet) == ["ok", "draining"]
    later = [fleet.add([number] * 8) for number in range(4)]
    assert {fleet.place(stream) for stream in later} == {0}
    assert not drained
    fleet.run()
    assert drained == [1]
    assert [fleet.take(stream) for stream in streams] == [expected_tokens([number] * 8, 10) for number in range(4)]
    fleet.router.core_removed(1)
    assert statuses(fleet) == ["ok"]
    assert fleet.router.total_stats.core.generation_tokens == 4 * 10 + 4 * 4, "counters stay"
    fleet.restart(1)  # the number is used again
    assert statuses(fleet) == ["ok", "ok"]
    assert {fleet.place(fleet.add([number] * 8)) for number in range(4)} == {0, 1}


async def test_an_idle_replica_is_drained_at_once():
    fleet = Fleet(2, supervised=True)
    drained: list[int] = []
    fleet.router.on_drained = drained.append
    fleet.router.drain(1)
    assert drained == [1]


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_comes_and_goes_each_request_is_served_or_was_on_a_replica_that_died(seed: int):
    luck = random.Random(seed)
    fleet = Fleet(2, supervised=True)
    drained: list[int] = []
    fleet.router.on_drained = drained.append
    up, gone, draining = {0, 1}, set[int](), set[int]()
    asked: list[tuple[RequestStream, list[int], int]] = []
    lost: set[int] = set()  # requests with output on a replica that died, or moved before
    for _ in range(150):
        act = luck.random()
        if act < 0.4:
            prompt, most = [luck.randrange(50) for _ in range(luck.randint(1, 20))], luck.randint(1, 8)
            asked.append((fleet.add(prompt, max_tokens=most), prompt, most))
        elif act < 0.45 and up | draining:
            number = luck.choice(sorted(up | draining))
            lost |= {
                id(one) for one, _, _ in asked if one.client is fleet.router.cores[number] and one.live
                and (one.moved or not one.has_no_output)
            }  # fmt: skip
            fleet.router.core_lost(number, "it was killed", restarting=True)
            up.discard(number)
            draining.discard(number)
            gone.add(number)
        elif act < 0.55 and gone:
            number = luck.choice(sorted(gone))
            fleet.restart(number)
            gone.discard(number)
            up.add(number)
        elif act < 0.6 and len(fleet.cores) < 5:
            fleet.grow()
            up.add(len(fleet.cores) - 1)
        elif act < 0.65 and len(up) > 1:
            number = luck.choice(sorted(up))
            up.discard(number)
            draining.add(number)
            fleet.router.drain(number)
        else:
            fleet.turn()
        for number in draining & set(drained):
            fleet.router.core_removed(number)
            draining.discard(number)
            gone.add(number)
        drained.clear()
    for number in sorted(gone):
        fleet.restart(number)
    fleet.run()
    assert asked
    for stream, prompt, most in asked:
        if id(stream) in lost:
            with pytest.raises(EngineDeadError):
                assert not stream.is_open
        else:
            assert fleet.take(stream) == expected_tokens(prompt, most)
    assert fleet.router.num_held == 0
    assert [tracker.tokens_left() for tracker in fleet.router.trackers] == [0.0] * len(fleet.cores)
