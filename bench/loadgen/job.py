"""The work of one generator process, the start time of a load point, and its observer."""

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.loadgen.request import Address

LEAD_NS = 300_000_000  # from the start of the loop to time 0, for opening the first connections
_SHORT_LEAD_NS = 30_000_000  # for a few connections to a server on this machine
_FEW = 4
OPEN_AHEAD_NS = 250_000_000  # a connection is opened this long before its request is due
OPEN_EACH_NS = 200_000  # between two connections of a closed loop


class Observer(Protocol):
    """Watches a running load point and may end it."""

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        """Called about 5 times a second with the counts so far (finished excludes failed); False ends the load.

        Runs inside the loop, so it must be cheap. `now_s` is on the scale of the arrival times.
        """
        ...


class Running(Protocol):
    """A load that runs: a `Loop`, or several of them in processes of their own."""

    hold: bool  # continue when no request is awaited: another part of the load still waits for one of its own

    @property
    def awaited(self) -> int:
        """How many of the first requests, which the load waits for, have not ended; 0 or less: it may end."""
        ...


@dataclass(slots=True)
class Counts:
    sent: int = 0
    first_token: int = 0
    finished: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """Time 0 of a load point on both clocks: deadlines use the monotonic one, timestamps of arrivals the real one."""

    mono_ns: int
    real_ns: int

    @classmethod
    def soon(cls, lead_ns: int = LEAD_NS) -> "Start":
        mono_ns, real_ns = _now()
        return cls(mono_ns + lead_ns, real_ns + lead_ns)

    @classmethod
    def at(cls, real_ns: int) -> "Start":
        """A time on the real-time clock of this host."""
        mono_ns, now_ns = _now()
        return cls(mono_ns + real_ns - now_ns, real_ns)


def _now() -> tuple[int, int]:
    """The time on the monotonic and the real-time clock: of several readings, the one that took the least time."""
    readings = [(time.monotonic_ns(), time.time_ns(), time.monotonic_ns()) for _ in range(5)]
    before, real_ns, after = min(readings, key=lambda one: one[2] - one[0])
    return (before + after) // 2, real_ns


@dataclass(frozen=True, slots=True)
class Job:
    """What one generator process sends: payloads[i] at offsets_ns[i] after time 0 (sorted).

    With `concurrency` it is a closed loop without offsets: that many requests at time 0, then one whenever one ends.
    """

    address: Address
    payloads: Sequence[bytes]
    offsets_ns: Sequence[int]
    time_limit_s: float
    needed: int  # the load ends once this many first requests have ended
    concurrency: int | None = None

    @property
    def most_open(self) -> int:
        """The most connections that can be open at the same time."""
        return len(self.payloads) if self.concurrency is None else min(self.concurrency, len(self.payloads))

    @property
    def lead_ns(self) -> int:
        """Time to open the first connections. They are spread over it, since a connection that does not fit into the
        server's listen queue is retried only after a second."""
        first = self.concurrency or bisect_right(self.offsets_ns, OPEN_AHEAD_NS)
        if first <= _FEW and self.address.is_local:
            return _SHORT_LEAD_NS
        return LEAD_NS + (self.concurrency or 0) * OPEN_EACH_NS
