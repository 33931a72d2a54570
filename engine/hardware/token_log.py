"""When requests got their tokens: the times of an engine's messages, and for each request the messages with a token."""

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.columns import int64s


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Arrivals of the tokens of one request, in seconds of the engine's clock."""

    first_s: float
    last_s: float
    gaps_s: NDArray[np.float64]  # between two tokens each


class TokenLog:
    """The messages of one engine.

    A request gets a token in nearly every message while it runs, so ranges of messages take the place of its tokens:
    a few numbers, however long the output is.
    """

    def __init__(self) -> None:
        self._times = array("d")  # of each message
        self._ranges: dict[int, list[int]] = {}  # by handle: first message and end of each range; the last may be open
        self._handles = b""  # of the newest message …
        self._current: set[int] = set()  # … and as numbers

    def add(self, at: float, handles: bytes) -> set[int]:
        """Record a message with one token for each handle; returns those that got none in the message before.

        Args:
            at: its time in seconds.
            handles: int64[n].
        """
        number = len(self._times)
        self._times.append(at)
        if handles == self._handles:
            return set()
        before, self._current, self._handles = self._current, set(int64s(handles).tolist()), handles
        for handle in before - self._current:
            if (ranges := self._ranges.get(handle)) is not None:
                ranges.append(number)
        joined = self._current - before
        for handle in joined:
            self._ranges.setdefault(handle, []).append(number)
        return joined

    def count(self, handle: int) -> int:
        """Tokens of a request so far."""
        return sum(end - begin for begin, end in self._ranges_of(handle))

    def take(self, handles: list[int]) -> list[TokenTimes | None]:
        """The times of some requests, which are forgotten; None of one without a token.

        Gaps are views of one array where a request got a token in each message, so that long outputs cost nothing.
        """
        times = np.array(self._times)
        gaps = np.diff(times)
        taken = [self._read(handle, times, gaps) for handle in handles]
        for handle in handles:
            self._ranges.pop(handle, None)
        if not self._ranges:
            self._times, self._handles, self._current = array("d"), b"", set()
        return taken

    def _ranges_of(self, handle: int) -> list[tuple[int, int]]:
        ends = self._ranges.get(handle, [])
        closed = ends if len(ends) % 2 == 0 else [*ends, len(self._times)]
        return list(zip(closed[::2], closed[1::2], strict=True))

    def _read(self, handle: int, times: NDArray[np.float64], gaps: NDArray[np.float64]) -> TokenTimes | None:
        ranges = self._ranges_of(handle)
        if not ranges:
            return None
        first, end = ranges[0][0], ranges[-1][1]
        if len(ranges) == 1:
            own = gaps[first : end - 1]
        else:
            own = np.diff(np.concatenate([times[begin:stop] for begin, stop in ranges]))
        return TokenTimes(float(times[first]), float(times[end - 1]), own)
