"""The sockets of the measured path: non-blocking, one a request, with the arrival time of every read.

On Linux the kernel stamps a segment when it arrives, so the stamp doesn't suffer from a client that reads late. A read
that covers several segments carries the stamp of the last one. TLS and other systems stamp at the read.
"""

import contextlib
import os
import socket
import ssl
import struct
import time
from typing import Protocol

from bench.loadgen.alarm import READ, WRITE
from bench.loadgen.target import Address

BUFFER_BYTES = 1 << 18
_SO_TIMESTAMPNS = 35  # not in the socket module
_TIMESPEC = struct.Struct("qq")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0
BLOCKED = -1


class Connection(Protocol):
    """One socket; errors are OSErrors."""

    def fileno(self) -> int: ...

    def advance(self) -> int:
        """Go on connecting: 0 when ready to send, else the mask to wait for."""
        ...

    def send(self, data: memoryview) -> int:
        """Bytes taken, or BLOCKED."""
        ...

    def receive(self) -> tuple[int, int]:
        """Bytes put in the shared buffer (0 at the end of the stream, or BLOCKED), CLOCK_REALTIME stamp in ns."""
        ...

    def close(self) -> None: ...


class ReceiveBuffer:
    """One buffer for all connections: each read is copied out of it before the next."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(BUFFER_BYTES))
        self.parts = [self.view]


def connect(address: Address, buffer: ReceiveBuffer) -> Connection:
    """Start connecting; raises OSError when even that fails."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stamped = address.tls is None and _ask_for_stamps(sock)
        with contextlib.suppress(BlockingIOError):
            sock.connect(address.sockaddr)
        if address.tls is None:
            return PlainConnection(sock, buffer, stamped)
        return TlsConnection(sock, buffer, address.tls, address.host)
    except OSError:
        sock.close()
        raise


def _ask_for_stamps(sock: socket.socket) -> bool:
    if not _ANCILLARY_BYTES or not hasattr(sock, "recvmsg_into"):
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    # The number means something else on other systems: only what reads back as set is trusted.
    return bool(sock.getsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS))


class PlainConnection:
    """TCP, with kernel stamps where the system gives them."""

    def __init__(self, sock: socket.socket, buffer: ReceiveBuffer, stamped: bool):
        self._sock = sock
        self._buffer = buffer
        self._ancillary = _ANCILLARY_BYTES if stamped else 0
        self._connected = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def advance(self) -> int:
        if not self._connected:
            _raise_pending(self._sock)
            if not _has_peer(self._sock):
                return WRITE
            self._connected = True
        return 0

    def send(self, data: memoryview) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return BLOCKED

    def receive(self) -> tuple[int, int]:
        try:
            if not self._ancillary:
                return self._sock.recv_into(self._buffer.view), time.time_ns()
            count, ancillary, _, _ = self._sock.recvmsg_into(self._buffer.parts, self._ancillary)
        except BlockingIOError:
            return BLOCKED, 0
        if ancillary:  # nothing else was asked for
            seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
            return count, seconds * 1_000_000_000 + nanoseconds
        return count, time.time_ns()

    def close(self) -> None:
        self._sock.close()


class TlsConnection:
    """TLS over TCP; a stamp is the time of the read that decrypted the bytes."""

    def __init__(self, sock: socket.socket, buffer: ReceiveBuffer, context: ssl.SSLContext, host: str):
        self._sock: socket.socket = sock
        self._tls: ssl.SSLSocket | None = None
        self._buffer = buffer
        self._context = context
        self._host = host

    def fileno(self) -> int:
        return (self._tls or self._sock).fileno()

    def advance(self) -> int:
        if self._tls is None:
            _raise_pending(self._sock)
            if not _has_peer(self._sock):
                return WRITE
            self._tls = self._context.wrap_socket(self._sock, server_hostname=self._host, do_handshake_on_connect=False)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return READ
        except ssl.SSLWantWriteError:
            return WRITE
        return 0

    def send(self, data: memoryview) -> int:
        assert self._tls is not None
        try:
            return self._tls.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return BLOCKED

    def receive(self) -> tuple[int, int]:
        assert self._tls is not None
        try:
            # A call returns one TLS record whole (the buffer is larger), so nothing stays hidden from the poll.
            return self._tls.recv_into(self._buffer.view), time.time_ns()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return BLOCKED, 0

    def close(self) -> None:
        (self._tls or self._sock).close()


def _raise_pending(sock: socket.socket) -> None:
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
