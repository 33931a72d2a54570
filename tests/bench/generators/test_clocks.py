"""Clocks that are compared: the error is within half of the shortest round trip, and a drift is found."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.generators import clocks
from bench.generators.clocks import RoundTrip, clock_fault, compare, host_clock

delays = st.integers(0, 5_000_000)  # ns, one way


class Hosts:
    """Two hosts with one true time; the clock of the other one is ahead by `offset_ns`."""

    def __init__(self, offset_ns: int, trips: Sequence[tuple[int, int, int]]):
        self.now_ns = 1_700_000_000_000_000_000
        self.trips = 0
        self._offset_ns = offset_ns
        self._trips = trips

    def time_ns(self) -> int:
        return self.now_ns

    def exchange(self) -> tuple[int, int]:
        there, in_between, back = self._trips[self.trips % len(self._trips)]
        self.trips += 1
        self.now_ns += there
        received = self.now_ns + self._offset_ns
        self.now_ns += in_between
        sent = self.now_ns + self._offset_ns
        self.now_ns += back
        return received, sent

    def compare(self) -> RoundTrip:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clocks.time, "time_ns", self.time_ns)
            return compare(self.exchange)


@given(offset_ns=st.integers(-(10**12), 10**12), trips=st.lists(st.tuples(delays, delays, delays), min_size=1))
def test_the_offset_is_within_half_of_the_shortest_round_trip(
    offset_ns: int, trips: list[tuple[int, int, int]]
) -> None:
    found = Hosts(offset_ns, trips).compare()
    seen = trips if len(trips) <= 16 else trips[:16]
    assert found.delay_ns <= min(there + back for there, _, back in seen)
    assert abs(found.offset_ns - offset_ns) <= found.delay_ns / 2 + 1


def test_long_round_trips_are_repeated() -> None:
    hosts = Hosts(0, [(2_000_000, 0, 2_000_000)] * 50 + [(50_000, 0, 50_000)])
    assert hosts.compare().delay_ns == 100_000
    assert hosts.trips == 51


@given(before=delays, after=delays, offset_ns=st.integers(-(10**10), 10**10), drift_ns=st.integers(-(10**7), 10**7))
def test_what_is_left_of_the_difference(before: int, after: int, offset_ns: int, drift_ns: int) -> None:
    first = Hosts(offset_ns, [(before, 0, before)]).compare()
    clock = host_clock("host:1", first, Hosts(offset_ns + drift_ns, [(after, 0, after)]).compare())
    assert clock.offset_s == pytest.approx(offset_ns / 1e9, abs=2e-9)
    assert clock.drift_s == pytest.approx(drift_ns / 1e9, abs=2e-9)
    assert clock.error_s == pytest.approx(abs(drift_ns) / 1e9 + max(before, after) / 1e9, abs=1e-8)
    if abs(clock.error_s - 0.001) > 1e-7:
        assert bool(clock_fault(clock)) == (clock.error_s > 0.001)


def test_a_fault_names_generator_and_numbers() -> None:
    near, moved = RoundTrip(0, 50_000, 50_000, 100_000), RoundTrip(0, 1_850_000, 1_850_000, 100_000)
    assert clock_fault(host_clock("10.0.0.5:7070", near, near)) == ""
    fault = clock_fault(host_clock("10.0.0.5:7070", near, moved))
    assert fault == (
        "the clock of generator 10.0.0.5:7070 is known only to within 1.85 ms (it moved by +1.80 ms during the load); "
        "the limit is 1 ms"
    )
    assert math.isclose(host_clock("x", near, moved).offset_s, 0.0)
