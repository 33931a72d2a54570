"""The one source of time of an engine, passed in, so that tests and simulated devices can supply their own."""

import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since an arbitrary origin, never going backwards."""
        ...


class MonotonicClock:
    """Real time. On Linux all processes of a machine share the origin, so their timestamps are comparable."""

    def now(self) -> float:
        return time.monotonic()


class FakeClock:
    """A clock that stands still until `advance` is called."""

    def __init__(self, start: float = 0.0):
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"time can't go back by {-seconds} s")
        self._now += seconds
