"""Transport of messages between a front end and the core."""

import asyncio
import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from engine.messages import Ready, ToCore, encode
from engine.multimodal.feature_files import link_features, unlink_features

log = logging.getLogger("redline.client")

PIECE_BYTES = 1 << 20  # of a file at a time, so that heartbeats get through between pieces
TURN_S = 0.01  # for messages, one after the other, before other tasks of the event loop run; a message is read whole


class CoreAddress(msgspec.Struct):
    """The addresses at which one front end reaches a core, and the core's report.

    Args:
        to_core: empty if the core is gone.
        from_core: of a core on another machine, the name of the front end's connection.
        secret: of the connections to a core on another machine.
    """

    ready: Ready
    to_core: str = ""
    from_core: str = ""
    secret: str = ""

    def make_transport(self) -> "Transport":
        """Connect to the core. If it has ended meanwhile, messages are dropped until an event reports its end."""
        if not self.to_core:
            return NoTransport()
        if self.secret:
            return TcpTransport(self.to_core, self.from_core, self.secret)
        try:
            return ZmqTransport(self.to_core, self.from_core)
        except zmq.ZMQError as error:
            if error.errno != errno.ENOENT:
                raise
            return NoTransport()  # the folder of its sockets was removed


class Transport(Protocol):
    """Carries a front end's messages to the core, and the core's (encoded) back."""

    def open(self, deliver: Callable[[bytes], None]) -> None:
        """Start to call `deliver` with messages; called once, inside the running event loop."""
        ...

    def send(self, message: ToCore) -> None:
        """Send a message without waiting."""
        ...

    def hand_over(self, path: str, new: str) -> None:
        """Give the core a feature file of its own at `new`, before the messages that follow. Raises OSError."""
        ...

    def take_back(self, new: str) -> None:
        """Remove a file that the core was given, but no message has named."""
        ...

    def close(self) -> None: ...


class LocalFiles:
    """Gives files to a core of this machine: it gets links."""

    def hand_over(self, path: str, new: str) -> None:
        link_features(path, new)

    def take_back(self, new: str) -> None:
        unlink_features(new)


class ZmqTransport(LocalFiles):
    """ZeroMQ sockets served by the event loop that `open` runs in."""

    def __init__(self, to_core: str, from_core: str):
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbound, self._outbound = self._connect(to_core, from_core)
        self._descriptor = int(self._inbound.getsockopt(zmq.FD))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Callable[[bytes], None] = _drop

    def _connect(self, to_core: str, from_core: str) -> "tuple[zmq.Socket[bytes], zmq.Socket[bytes]]":
        """The sockets to read from and to write to. Raises zmq.ZMQError if the core's folder is gone."""
        inbound, outbound = self._context.socket(zmq.PULL), self._context.socket(zmq.PUSH)
        inbound.set_hwm(0)
        try:
            inbound.bind(from_core)
        except zmq.ZMQError:
            self._context.destroy(linger=0)
            raise
        outbound.set_hwm(0)
        outbound.setsockopt(zmq.LINGER, 0)
        outbound.connect(to_core)
        return inbound, outbound

    def open(self, deliver: Callable[[bytes], None]) -> None:
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)
        self._read()

    def send(self, message: ToCore) -> None:
        self._outbound.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        if self._inbound.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        self._inbound.close()
        self._outbound.close()
        self._context.term()

    def _read(self) -> None:
        if self._inbound.closed:
            return
        end = time.monotonic() + TURN_S
        while True:
            try:
                data = self._inbound.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._deliver(data)
            except Exception:  # later messages must still be read
                log.exception("a message of %d bytes could not be processed", len(data))
            if time.monotonic() >= end:
                break
        # The descriptor signals new messages only, not those that are left.
        assert self._loop is not None
        self._loop.call_soon(self._read)


class TcpTransport(ZmqTransport):
    """One connection to a core on another machine, for both directions; the gateway there also writes files."""

    def __init__(self, address: str, name: str, secret: str):
        self._secret = secret
        super().__init__(address, name)

    def _connect(self, to_core: str, from_core: str) -> "tuple[zmq.Socket[bytes], zmq.Socket[bytes]]":
        from engine.curve import secure_client

        socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(0)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IDENTITY, from_core.encode())
        secure_client(socket, self._secret)
        socket.connect(to_core)
        return socket, socket

    def send(self, message: ToCore) -> None:
        super().send(message)
        # Reading the events of a socket, as sending does, may hide that a message has come.
        if self._loop is not None:
            self._loop.call_soon(self._read)

    def hand_over(self, path: str, new: str) -> None:
        data = memoryview(Path(path).read_bytes())
        for begin in range(0, len(data), PIECE_BYTES):
            piece = data[begin : begin + PIECE_BYTES]
            self._outbound.send_multipart((new.encode(), b"%d" % begin, piece), zmq.NOBLOCK)

    def take_back(self, new: str) -> None:
        self._outbound.send_multipart((new.encode(), b"0", b""), zmq.NOBLOCK)


class NoTransport:
    """The transport of a client whose core is gone."""

    def open(self, deliver: Callable[[bytes], None]) -> None:
        """Nothing arrives."""

    def send(self, message: ToCore) -> None:
        """Nobody gets it: an event follows, which fails or moves what waits for an answer."""

    def hand_over(self, path: str, new: str) -> None:  # noqa: ARG002
        raise AssertionError("a file for a core that is gone")

    def take_back(self, new: str) -> None:
        """The file is gone with the core."""

    def close(self) -> None: ...


def _drop(_data: bytes) -> None:
    """Ignore a message that arrives before `open`."""
