"""A connection that carries messages: TCP, with or without TLS; four bytes of length before each message."""

import contextlib
import select
import socket
import ssl
import struct
import time

import msgspec

from bench.generators.messages import AnyMessage

STRANGER_BYTES = 1 << 12  # longest message of a peer that has not proved that it has the token
MOST_BYTES = 1 << 30  # longest message otherwise
_LENGTH = struct.Struct("!I")
_READ_BYTES = 1 << 18
_SEND_BYTES = 1 << 20
_SEND_LIMIT_S = 60.0  # without any progress
# A host that is gone without a word: noticed within about 10 s, with data on the way or without.
_GONE_MS = 10_000
_KEEPALIVE = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))


class ChannelError(Exception):
    """The connection is of no use any more; the message says why, after the name of the peer."""


class Channel:
    """Sends and receives messages; used by one thread at a time.

    Args:
        sock: connected, and with TLS after its handshake.
        peer: HOST:PORT, for messages.
    """

    def __init__(self, sock: socket.socket, peer: str):
        self.peer = peer
        self.most_bytes = STRANGER_BYTES
        self._sock = sock
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(AnyMessage)
        self._buffer = bytearray()
        self._closed = False
        sock.setblocking(False)
        _set_options(sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it, which closing alone does not
            self._sock.close()

    def send(self, message: AnyMessage) -> None:
        """Raises ChannelError."""
        content = self._encoder.encode(message)
        left = memoryview(_LENGTH.pack(len(content)) + content)
        while left:
            try:
                left = left[self._sock.send(left[:_SEND_BYTES]) :]
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError) as error:
                wanted = select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT
                if not self._wait(wanted, _SEND_LIMIT_S):
                    raise ChannelError(f"did not take any data for {_SEND_LIMIT_S:.0f} s") from None
            except (OSError, ValueError) as error:
                raise ChannelError(broken(error)) from None

    def receive(self, limit_s: float | None) -> AnyMessage | None:
        """The next message; None if none is complete within `limit_s` seconds. Raises ChannelError."""
        end = None if limit_s is None else time.monotonic() + limit_s
        while (message := self._take()) is None:
            try:
                data = self._sock.recv(_READ_BYTES)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._wait(select.POLLIN, left)
                continue
            except (OSError, ValueError) as error:
                raise ChannelError(broken(error)) from None
            if not data:
                raise ChannelError("closed the connection")
            self._buffer += data
        return message

    def _take(self) -> AnyMessage | None:
        """The first message of what was received, if it is complete."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > self.most_bytes:
            raise ChannelError("does not speak the protocol of redline generate")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        content = bytes(memoryview(self._buffer)[_LENGTH.size : end])
        del self._buffer[:end]
        try:
            return self._decoder.decode(content)
        except msgspec.MsgspecError:
            raise ChannelError("does not speak the protocol of redline generate") from None

    def _wait(self, events: int, limit_s: float | None) -> bool:
        """Wait until the socket is ready; False: the time is over."""
        poll = select.poll()
        try:
            poll.register(self._sock, events)
        except ValueError:
            raise ChannelError("the connection is closed") from None
        return bool(poll.poll(None if limit_s is None else max(0.0, limit_s) * 1000))


def _set_options(sock: socket.socket) -> None:
    """Send at once, and notice a host that is gone. Some systems lack some of the options."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_MS)


def broken(error: Exception) -> str:
    """Why a connection is of no use any more, after the name of the peer."""
    if isinstance(error, ssl.SSLError) and error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
        return "does not use TLS"
    if isinstance(error, ssl.SSLError):
        return f"broke the TLS connection ({(error.reason or str(error)).replace('_', ' ').lower()})"
    return f"broke the connection ({str(getattr(error, 'strerror', None) or error).lower()})"
