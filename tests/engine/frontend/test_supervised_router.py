"""Replicas that are started again, added and drained while requests come: none is lost."""

import asyncio
import random

import pytest

from engine.errors import EngineDeadError, RequestError
from engine.frontend.listener import ClientListener, OutputRecord
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
    assert fleet.router.stats.held == 2, "one without output, and a new one"
    assert before.is_open
    fleet.restart(0)
    assert (fleet.router.unavailable, fleet.router.stats.held) == ("", 0)
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
    fleet.router.on_drained = lambda replica, _drain: drained.append(replica)
    streams = [fleet.add([number] * 8, max_tokens=10) for number in range(4)]
    places = [fleet.place(stream) for stream in streams]
    assert set(places) == {0, 1}
    fleet.router.drain(1, 1)
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


async def test_the_time_of_a_drain_is_up():
    fleet = Fleet(2, supervised=True)
    drained: list[tuple[int, int]] = []
    fleet.router.on_drained = lambda *report: drained.append(report)
    streams = [fleet.add([number] * 8, max_tokens=30) for number in range(4)]
    while not all(fleet.take(stream) for stream in streams):
        fleet.turn()
    waiting = [fleet.add([number] * 8) for number in range(4, 8)]
    places = [fleet.place(stream) for stream in streams]
    late = [stream for stream in waiting if fleet.place(stream) == 1]
    assert late, "some of those that have no output are there too"
    fleet.router.drain(1, 7)
    fleet.router.end_drain(1, "its time is up (--drain-timeout)")
    assert drained == [(1, 7)]
    assert {fleet.place(stream) for stream in waiting} == {0}, "what has no output moves"
    fleet.run()
    assert not fleet.cores[1].has_work, "its core has forgotten them"
    for stream, place in zip(streams, places, strict=True):
        if place == 1:
            with pytest.raises(EngineDeadError, match="--drain-timeout"):
                assert not stream.is_open
        else:
            assert len(fleet.take(stream)) == 30
    assert [fleet.take(stream) for stream in waiting] == [expected_tokens([one] * 8, 4) for one in range(4, 8)]
    assert fleet.router.total_stats.events("drain_timeout") == places.count(1)
    assert fleet.router.total_stats.live == 0
    assert [tracker.tokens_left() for tracker in fleet.router.trackers] == [0.0, 0.0]


async def test_the_log_has_the_reason_of_requests_that_a_drain_has_ended():
    records: list[OutputRecord] = []

    class Records(ClientListener):
        @property
        def wants_records(self) -> bool:
            return True

        def output_recorded(self, record: OutputRecord) -> None:
            records.append(record)

    fleet = Fleet(2, supervised=True)
    fleet.router.listener = Records()
    stream = fleet.add([1], max_tokens=40)
    while not fleet.take(stream):
        fleet.turn()
    place = fleet.place(stream)
    fleet.router.drain(place, 1)
    fleet.router.end_drain(place, "its time is up")
    assert not records, "the core has not reported it yet"
    fleet.run()
    [record] = records
    assert (record.finish_reason, record.error, record.replica) == ("error", "its time is up", place)
    assert record.output_tokens > 0


async def test_a_request_that_a_drain_has_moved_may_be_retried_once_as_any_other():
    fleet = Fleet(2, supervised=True)
    stream = next(one for one in (fleet.add([number] * 8) for number in range(4)) if fleet.place(one) == 1)
    fleet.router.drain(1, 1)
    fleet.router.end_drain(1, "its time is up")
    fleet.router.core_lost(0, "it was killed", restarting=True)
    assert stream.is_open
    fleet.restart(0)
    fleet.router.core_lost(0, "it was killed", restarting=True)
    with pytest.raises(EngineDeadError, match="it was killed"):
        assert not stream.is_open


async def test_the_end_of_a_drain_that_is_over_or_was_canceled_changes_nothing():
    fleet = Fleet(2, supervised=True)
    stream = next(one for one in (fleet.add([number] * 8) for number in range(4)) if fleet.place(one) == 1)
    fleet.router.drain(1, 1)
    fleet.router.cancel_drain(1)
    fleet.router.end_drain(1, "its time is up")
    assert statuses(fleet) == ["ok", "ok"]
    fleet.run()
    assert len(fleet.take(stream)) == 4
    fleet.router.drain(1, 2)
    fleet.router.core_lost(1, "it was killed")
    assert statuses(fleet) == ["ok", "draining"], "until it is removed"
    fleet.router.end_drain(1, "its time is up")


async def test_a_replica_that_is_drained_no_longer_takes_what_waits():
    fleet = Fleet(2, supervised=True)
    fleet.router.drain(1, 1)
    fleet.router.core_lost(0, "it was killed", restarting=True)
    held = fleet.add([1])
    assert fleet.router.stats.held == 1
    fleet.router.cancel_drain(1)
    assert fleet.place(held) == 1
    fleet.run()
    assert fleet.take(held) == expected_tokens([1], 4)


async def test_an_idle_replica_is_drained_at_once():
    fleet = Fleet(2, supervised=True)
    drained: list[int] = []
    fleet.router.on_drained = lambda replica, _drain: drained.append(replica)
    fleet.router.drain(1, 1)
    assert drained == [1]


class Changes:
    """A fleet whose replicas come and go, and which requests that loses."""

    def __init__(self, seed: int):
        self.luck = random.Random(seed)
        self.fleet = Fleet(2, supervised=True)
        self.fleet.router.on_drained = lambda replica, _drain: self.drained.add(replica)
        self.drained: set[int] = set()
        self.up, self.gone, self.draining = {0, 1}, set[int](), set[int]()
        self.asked: list[tuple[RequestStream, list[int], int]] = []
        self.lost: set[int] = set()  # requests with output on a replica that died or had no more time, or moved before

    def ask(self) -> None:
        prompt, most = [self.luck.randrange(50) for _ in range(self.luck.randint(1, 20))], self.luck.randint(1, 8)
        self.asked.append((self.fleet.add(prompt, max_tokens=most), prompt, most))

    def kill(self, number: int) -> None:
        self._lose(number, moved=True)
        self.fleet.router.core_lost(number, "it was killed", restarting=True)
        self.up.discard(number)
        self.draining.discard(number)
        self.gone.add(number)

    def restart(self, number: int) -> None:
        self.fleet.restart(number)
        self.gone.discard(number)
        self.up.add(number)

    def grow(self) -> None:
        self.fleet.grow()
        self.up.add(len(self.fleet.cores) - 1)

    def drain(self, number: int) -> None:
        self.up.discard(number)
        self.draining.add(number)
        self.fleet.router.drain(number, 1)

    def end_drain(self, number: int) -> None:
        if self.luck.random() < 0.5:
            self.fleet.router.cancel_drain(number)
            self.draining.discard(number)
            self.up.add(number)
        else:
            self._lose(number, moved=False)
            self.fleet.router.end_drain(number, "its time is up")

    def remove_drained(self) -> None:
        for number in self.draining & self.drained:
            self.fleet.router.core_removed(number)
            self.draining.discard(number)
            self.gone.add(number)
        self.drained.clear()

    def _lose(self, number: int, *, moved: bool) -> None:
        """Requests fail: those with output on a replica, and if `moved`, those that were retried before."""
        there = [one for one, _, _ in self.asked if one.client is self.fleet.router.cores[number] and one.live]
        self.lost |= {id(one) for one in there if not one.has_no_output or (moved and one.moved)}

    def act(self) -> None:
        act, pick = self.luck.random(), lambda numbers: self.luck.choice(sorted(numbers))
        if act < 0.4:
            self.ask()
        elif act < 0.45 and self.up | self.draining:
            self.kill(pick(self.up | self.draining))
        elif act < 0.55 and self.gone:
            self.restart(pick(self.gone))
        elif act < 0.6 and len(self.fleet.cores) < 5:
            self.grow()
        elif act < 0.65 and len(self.up) > 1:
            self.drain(pick(self.up))
        elif act < 0.7 and self.draining:
            self.end_drain(pick(self.draining))
        else:
            self.fleet.turn()
        self.remove_drained()


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_comes_and_goes_each_request_is_served_or_was_on_a_replica_that_died(seed: int):
    changes = Changes(seed)
    for _ in range(150):
        changes.act()
    fleet = changes.fleet
    for number in sorted(changes.gone):
        changes.restart(number)
    fleet.run()
    assert changes.asked
    for stream, prompt, most in changes.asked:
        if id(stream) in changes.lost:
            with pytest.raises(EngineDeadError):
                assert not stream.is_open
        else:
            assert fleet.take(stream) == expected_tokens(prompt, most)
    assert fleet.router.stats.held == 0
    assert fleet.router.total_stats.live == 0
    assert [tracker.tokens_left() for tracker in fleet.router.trackers] == [0.0] * len(fleet.cores)
