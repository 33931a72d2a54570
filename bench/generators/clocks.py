"""Clocks of two hosts compared by round trips, as in RFC 5905, section 8."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.loadgen.recording import HostClock

LIMIT_S = 0.001  # of what is left of the difference of two clocks: beyond it a load point is invalid
_ROUND_TRIPS = 16
_MOST_ROUND_TRIPS, _MOST_S = 400, 1.0  # while the shortest one is not short enough for the limit …
_SHORT = 0.25  # … which it is with this share of it


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Four times in nanoseconds: sent and received here, and between them received and sent there."""

    sent_ns: int
    there_received_ns: int
    there_sent_ns: int
    received_ns: int

    @property
    def delay_ns(self) -> int:
        return max(0, self.received_ns - self.sent_ns - (self.there_sent_ns - self.there_received_ns))

    @property
    def offset_ns(self) -> int:
        """Their clock minus the clock here; wrong by at most half of the delay."""
        return (self.there_received_ns - self.sent_ns + self.there_sent_ns - self.received_ns) // 2


def compare(exchange: Callable[[], tuple[int, int]]) -> RoundTrip:
    """The shortest of several round trips; `exchange` makes one and returns both times of the other host."""
    best: RoundTrip | None = None
    end = time.monotonic() + _MOST_S
    for number in range(_MOST_ROUND_TRIPS):
        short = best is not None and best.delay_ns / 2e9 < _SHORT * LIMIT_S
        if number >= _ROUND_TRIPS and (short or time.monotonic() > end):
            break
        sent_ns = time.time_ns()
        received, sent = exchange()
        trip = RoundTrip(sent_ns, received, sent, time.time_ns())
        if best is None or trip.delay_ns < best.delay_ns:
            best = trip
    assert best is not None
    return best


def host_clock(generator: str, before: RoundTrip, after: RoundTrip) -> HostClock:
    """What both comparisons say of a generator's clock over the load between them."""
    drift_s = (after.offset_ns - before.offset_ns) / 1e9
    error_s = abs(drift_s) + max(before.delay_ns, after.delay_ns) / 2e9
    return HostClock(generator, before.offset_ns / 1e9, drift_s, error_s)


def clock_fault(clock: HostClock) -> str:
    """Why the clock makes a load point invalid; "" if it does not."""
    if not clock.error_s > LIMIT_S:
        return ""
    return (
        f"the clock of generator {clock.generator} is known only to within {clock.error_s * 1e3:.2f} ms (it moved by "
        f"{clock.drift_s * 1e3:+.2f} ms during the load); the limit is {LIMIT_S * 1e3:g} ms"
    )
