"""Messages over a socket, however its bytes are cut."""

import socket
import struct
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.generators.channel import MOST_BYTES, STRANGER_BYTES, Channel, ChannelError
from bench.generators.messages import AnyMessage, Begin, Failed, Ping, Progress, Recorded, Requests, Streams

numbers = st.integers(0, 2**40)
recorded = st.builds(
    Recorded, numbers, numbers, numbers, numbers, numbers, st.binary(max_size=50), st.binary(), st.binary(),
    st.binary(), st.booleans(), st.booleans(), st.none() | st.tuples(st.text(), st.text()),
)  # fmt: skip
messages = st.one_of(
    st.builds(Ping),
    st.builds(Begin, st.integers(-(2**62), 2**62)),
    st.builds(Failed, st.text()),
    st.builds(Progress, numbers, numbers, numbers, numbers, st.integers(-5, 10**6)),
    st.builds(Requests, st.lists(st.binary(max_size=2000), max_size=5)),
    st.builds(Streams, st.lists(recorded, max_size=3), st.booleans()),
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours, "peer:1")
    yield channel, theirs
    channel.close()
    theirs.close()


def framed(message: AnyMessage) -> bytes:
    content = msgspec.msgpack.encode(message)
    return struct.pack("!I", len(content)) + content


@given(sent=st.lists(messages, max_size=6), cuts=st.lists(st.integers(1, 5000)))
def test_messages_arrive_as_they_were_sent(sent: list[AnyMessage], cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel = Channel(ours, "peer:1")
        channel.most_bytes = MOST_BYTES
        left = b"".join(map(framed, sent))
        found: list[AnyMessage] = []
        for cut in [*cuts, len(left)]:
            theirs.sendall(left[:cut])
            left = left[cut:]
            while (message := channel.receive(0.0)) is not None:
                found.append(message)
        channel.close()
    assert found == sent


def test_a_long_message_waits_for_a_slow_reader(ends: tuple[Channel, socket.socket]) -> None:
    import threading

    channel, theirs = ends
    message = Requests([bytes(3_000_000), b"x" * 3_000_000])
    other = Channel(theirs, "peer:2")
    other.most_bytes = MOST_BYTES
    found: list[AnyMessage | None] = []
    reader = threading.Thread(target=lambda: found.append(other.receive(30.0)))
    reader.start()
    channel.send(message)
    reader.join()
    assert found == [message]


@pytest.mark.parametrize(
    "content",
    [
        lambda: struct.pack("!I", STRANGER_BYTES + 1),
        lambda: b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
        lambda: struct.pack("!I", 3) + b"\xc1\xc1\xc1",
        lambda: framed(Ping())[:4] + msgspec.msgpack.encode({"t": "nope"})[: len(framed(Ping())) - 4],
    ],
)
def test_other_bytes_are_refused(ends: tuple[Channel, socket.socket], content: Callable[[], bytes]) -> None:
    channel, theirs = ends
    theirs.sendall(content())
    with pytest.raises(ChannelError, match="does not speak the protocol"):
        channel.receive(5.0)


def test_the_end_of_a_connection(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    assert channel.receive(0.01) is None
    theirs.sendall(framed(Ping())[:3])
    assert channel.receive(0.01) is None
    theirs.close()
    with pytest.raises(ChannelError, match="closed the connection"):
        channel.receive(5.0)
    with pytest.raises(ChannelError, match="broke the connection"):
        channel.send(Ping())
    channel.close()
    with pytest.raises(ChannelError):
        channel.receive(None)
