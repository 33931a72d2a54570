"""Waits for sockets with a deadline: a timerfd among the polled descriptors, or the poll's own timeout.

The timeout of a poll has a resolution of milliseconds, a timerfd one of nanoseconds. The kernel still takes some 60 us
to wake a process, so the last moments before a send are spent polling.
"""

import ctypes
import os
import select
import time

READ, WRITE = 1, 4  # the same bits for poll and epoll
_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_BATCH = 32  # limit of events per wait, so that many arrivals do not delay a send


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Poller:
    """Readiness of descriptors, with a deadline on the monotonic clock in nanoseconds."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._poll = None if self._epoll else select.poll()
        self._deadline = -1
        self._spec = _Itimerspec()
        self._libc, self._timer = _open_timer() if self._epoll else (None, -1)
        if self._timer >= 0:
            self.watch(self._timer, READ)

    def watch(self, fd: int, mask: int) -> None:
        """Start watching a descriptor."""
        (self._epoll or self._poll).register(fd, mask)  # type: ignore[union-attr]

    def change(self, fd: int, mask: int) -> None:
        """Change what a descriptor is watched for."""
        (self._epoll or self._poll).modify(fd, mask)  # type: ignore[union-attr]

    def forget(self, fd: int) -> None:
        (self._epoll or self._poll).unregister(fd)  # type: ignore[union-attr]

    def wait(self, deadline_ns: int, polled_ns: int = 0) -> list[tuple[int, int]]:
        """Ready (fd, events) pairs; empty at the deadline, or before it.

        Args:
            deadline_ns: on the monotonic clock.
            polled_ns: how long before the deadline the process no longer sleeps, where there are timers.
        """
        if self._timer < 0:
            left_s = max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
            if self._epoll is not None:
                return self._epoll.poll(left_s, _BATCH)
            assert self._poll is not None
            return self._poll.poll(left_s * 1000)
        assert self._epoll is not None
        if polled_ns:
            deadline_ns -= polled_ns
            if time.monotonic_ns() >= deadline_ns:
                return self._poll_until(deadline_ns + polled_ns)
        if deadline_ns != self._deadline:
            self._arm(deadline_ns)
        return self._without_timer(self._epoll.poll(-1, _BATCH))

    def close(self) -> None:
        if self._timer >= 0:
            os.close(self._timer)
            self._timer = -1
        if self._epoll is not None:
            self._epoll.close()

    def _poll_until(self, deadline_ns: int) -> list[tuple[int, int]]:
        assert self._epoll is not None
        poll, clock = self._epoll.poll, time.monotonic_ns
        while True:
            ready = poll(0, _BATCH)
            if ready:
                ready = self._without_timer(ready)
            if ready or clock() >= deadline_ns:
                return ready

    def _without_timer(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        for position, (fd, _) in enumerate(ready):
            if fd == self._timer:
                os.read(self._timer, 8)
                self._deadline = -1
                del ready[position]
                break
        return ready

    def _arm(self, deadline_ns: int) -> None:
        self._deadline = deadline_ns
        # A value of 0 would disarm the timer; any time in the past fires at once.
        self._spec.value.seconds, self._spec.value.nanoseconds = divmod(max(1, deadline_ns), 1_000_000_000)
        assert self._libc is not None
        if self._libc.timerfd_settime(self._timer, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")


def _open_timer() -> tuple[ctypes.CDLL | None, int]:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return None, -1
    return libc, fd
