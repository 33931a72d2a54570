"""Waiting with a deadline before which the process does not sleep."""

import socket
import time

import pytest

from bench.loadgen.poller import READ, Poller


@pytest.mark.parametrize("polled_ns", [0, 2_000_000, 1 << 40])
def test_a_wait_ends_at_the_deadline(polled_ns: int) -> None:
    poller = Poller()
    deadline = time.monotonic_ns() + 5_000_000
    while time.monotonic_ns() < deadline:
        assert poller.wait(deadline, polled_ns) == []
    assert poller.wait(deadline, polled_ns) == []  # it is over
    poller.close()


@pytest.mark.parametrize("polled_ns", [0, 1 << 40])
def test_what_is_ready_ends_a_wait(polled_ns: int) -> None:
    poller = Poller()
    mine, other = socket.socketpair()
    with mine, other:
        poller.watch(mine.fileno(), READ)
        other.send(b"x")
        far = time.monotonic_ns() + (1 << 39)
        assert poller.wait(far, polled_ns) == [(mine.fileno(), READ)]
        mine.recv(1)
        # A timer of an earlier deadline fires while the process polls for a later one.
        near = time.monotonic_ns() + 1_000_000
        poller.wait(near)
        assert time.monotonic_ns() >= near
        other.send(b"y")
        assert poller.wait(far, polled_ns) == [(mine.fileno(), READ)]
    poller.close()
