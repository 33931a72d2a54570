"""Memory that one process writes and several read."""

import os
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.worker.local_links import LocalEnd, split_command
from engine.worker.rank_protocol import FrameKind
from engine.worker.ring import Ring, RingReader


def readers_of(ring: Ring, count: int) -> list[RingReader]:
    return [RingReader(os.dup(ring.descriptor), i, count) for i in range(count)]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(1, 3))
def test_each_reads_what_was_written_around_the_end_too(messages: list[bytes], count: int) -> None:
    ring = Ring(count, size=64)
    readers = readers_of(ring, count)
    for message in messages:
        assert ring.write(message)
        assert [reader.read(len(message)) for reader in readers] == [message] * count
    ring.close()


def test_a_writer_waits_for_the_slowest_reader() -> None:
    ring = Ring(2, size=64)
    quick, slow = readers_of(ring, 2)
    for i in range(2):
        assert ring.write(bytes([i]) * 32)
        assert quick.read(32) == bytes([i]) * 32
    written = threading.Thread(target=ring.write, args=(b"x" * 32,))
    written.start()
    written.join(0.05)
    assert written.is_alive()
    assert slow.read(32) == bytes(32)
    written.join(10)
    assert not written.is_alive()
    assert [slow.read(32), slow.read(32)] == [b"\x01" * 32, b"x" * 32]
    assert quick.read(32) == b"x" * 32
    ring.close()


def test_a_writer_that_waits_ends_when_the_ring_is_closed() -> None:
    ring = Ring(1, size=8)
    assert ring.write(b"12345678")
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(ring.write(b"9")))
    waiting.start()
    ring.close()
    waiting.join(10)
    assert answers == [False]


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 1000])
def test_orders_of_any_length_pass(length: int) -> None:
    """Those longer than the ring in parts, while the reader takes them."""
    ring = Ring(1, size=64)
    (reader,) = readers_of(ring, 1)
    ours, theirs = socket.socketpair()
    body = os.urandom(length)

    def send() -> None:
        for kind in (FrameKind.FORWARD, FrameKind.SAMPLE):
            for head, part in split_command(kind, body, ring.size // 2):
                assert ring.write(part)
                ours.sendall(head)
        ours.close()

    sender = threading.Thread(target=send)
    sender.start()
    with theirs:
        end = LocalEnd(theirs, reader)
        orders = [end.receive() for _ in range(3)]
    sender.join()
    assert orders == [(FrameKind.FORWARD, body), (FrameKind.SAMPLE, body), None]
    ring.close()
