"""When requests are due, and when their connections are opened; what must not delay a send."""

import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.loadgen import loop as module
from bench.loadgen.job import OPEN_AHEAD_NS, OPEN_EACH_NS, Job, Start
from bench.loadgen.loop import Loop
from bench.loadgen.request import Address
from bench.loadgen.schedule import NEVER, POLLED_NS, POLLED_SHARE, Schedule

ADDRESS = Address("h", 1, "", None, socket.AF_INET, ("127.0.0.1", 1))
START = Start(10**12, 10**18)


@given(st.lists(st.integers(0, 10**11), max_size=50).map(sorted))
def test_an_open_loop(offsets: list[int]) -> None:
    job = Job(ADDRESS, [b""] * len(offsets), offsets, 60.0, len(offsets))
    schedule = Schedule.of(job, START)
    assert schedule.offsets == offsets
    assert schedule.due == [START.mono_ns + offset for offset in offsets]
    assert schedule.opened == [at - OPEN_AHEAD_NS for at in schedule.due]
    assert schedule.polled_ns <= POLLED_NS
    if len(offsets) > 1:  # the time without sleep is a small share, however many requests there are
        assert schedule.polled_ns * (len(offsets) - 1) <= POLLED_SHARE * (offsets[-1] - offsets[0])


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_closed_loop_opens_its_connections_one_by_one(requests: int, concurrency: int) -> None:
    job = Job(ADDRESS, [b""] * requests, [], 60.0, requests, concurrency)
    schedule, first = Schedule.of(job, START), min(requests, concurrency)
    assert schedule.due == [START.mono_ns] * first + [NEVER] * (requests - first)
    assert schedule.opened[first:] == [NEVER] * (requests - first)
    steps = {
        after - before for before, after in zip(schedule.opened[: first - 1], schedule.opened[1:first], strict=True)
    }
    assert steps <= {OPEN_EACH_NS}
    assert schedule.opened[first - 1] == START.mono_ns - OPEN_AHEAD_NS
    if first > 4:  # fewer to this machine need no time
        assert schedule.opened[0] >= START.mono_ns - job.lead_ns
    assert schedule.polled_ns == 0


class Ticks:
    """An observer that notes when it was called."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def tick(self, now_s: float, *_: int) -> bool:
        self.calls.append(round(now_s, 9))
        return True


def begun(offsets_ms: list[float], monkeypatch: pytest.MonkeyPatch) -> tuple[Loop, Ticks, list[tuple[str, int]]]:
    """A loop whose streams are only noted as they are opened and sent."""
    events: list[tuple[str, int]] = []
    monkeypatch.setattr(Loop, "_open", lambda self, stream: _ready(stream, events))
    monkeypatch.setattr(Loop, "_send", lambda self, stream: events.append(("send", stream.index)))
    ticks = Ticks()
    job = Job(ADDRESS, [b""] * len(offsets_ms), [round(at * 1e6) for at in offsets_ms], 60.0, len(offsets_ms))
    return Loop(job, ticks, START), ticks, events


def _ready(stream: Any, events: list[tuple[str, int]]) -> None:
    events.append(("open", stream.index))
    stream.state = module.State.READY


def pass_at(loop: Loop, at_ms: float) -> float:
    """One pass of the loop at a time of the load; returns when it wakes next."""
    assert loop._on_time(START.mono_ns + round(at_ms * 1e6))
    return (loop._wake - START.mono_ns) / 1e6


def test_a_tick_waits_for_the_send_that_it_would_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, ticks, events = begun([100, 201, 300, 900], monkeypatch)
    assert pass_at(loop, 0) == 50  # a connection is opened
    assert ticks.calls == [0]
    pass_at(loop, 100)
    assert pass_at(loop, 200) == 201, "the tick was due at 200"
    assert (ticks.calls, loop._polled) == ([0], loop._most_polled)
    pass_at(loop, 201)
    assert events[-1] == ("send", 1)
    assert ticks.calls == [0, 0.201]
    loop.close()


def test_a_tick_does_not_wait_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, ticks, _ = begun([float(at) for at in range(400)], monkeypatch)
    for at in range(400):
        pass_at(loop, at)
    apart = [after - before for before, after in zip(ticks.calls, ticks.calls[1:], strict=False)]
    assert len(apart) >= 1
    assert max(apart) <= 0.3
    loop.close()


def test_a_send_comes_before_the_connection_of_another_request(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _, events = begun([0, 100.15, 350.1], monkeypatch)
    pass_at(loop, -140)
    assert events == [("open", 0), ("open", 1)]
    pass_at(loop, 0)
    assert events[-1] == ("send", 0)
    assert pass_at(loop, 100.1) == 100.15  # the connection of the third request is due, and a send shortly after it
    assert events[-1] == ("send", 0)
    pass_at(loop, 100.15)
    assert events[-2:] == [("send", 1), ("open", 2)]
    loop.close()


def test_a_request_that_is_due_before_its_connection_is_still_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause of the whole machine, for example."""
    loop, _, events = begun([0, 1], monkeypatch)
    pass_at(loop, 5000)
    assert events == [("open", 0), ("send", 0), ("open", 1), ("send", 1)]
    loop.close()


def test_many_requests_at_once_leave_time_for_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _, events = begun([0.0] * 100, monkeypatch)
    pass_at(loop, -200)
    assert [what for what, _ in events] == ["open"] * 100
    for most in (32, 64, 96, 100):
        assert pass_at(loop, 0) <= (0 if most < 100 else 200)
        assert sum(what == "send" for what, _ in events) == most
    loop.close()


def test_requests_that_end_during_the_first_sends_are_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that the concurrency is kept: every request that ended has another one in its place."""
    events: list[tuple[str, int]] = []
    monkeypatch.setattr(Loop, "_open", lambda self, stream: _ready(stream, events))

    def send(self: Loop, stream: Any) -> None:
        events.append(("send", stream.index))
        if stream.index < 3:  # these end at once
            self._drop(stream)

    monkeypatch.setattr(Loop, "_send", send)
    loop = Loop(Job(ADDRESS, [b""] * 100, [], 60.0, 100, concurrency=50), Ticks(), START)
    pass_at(loop, -250)
    for most in (32, 53, 53):
        pass_at(loop, 0)
        assert [index for what, index in events if what == "send"] == list(range(most))
    loop.close()
