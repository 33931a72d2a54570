"""The sockets of measured requests: non-blocking, one per request, with the arrival time of every read.

On Linux the kernel timestamps a segment on arrival, so a client that reads late does not falsify the time. A read that
covers several segments has the timestamp of the last one. With TLS and on other systems, the time of the read is used.
"""

import contextlib
import os
import socket
import ssl
import struct
import time
from typing import Protocol

from bench.loadgen.poller import READ, WRITE
from bench.loadgen.request import Address

BUFFER_BYTES = 1 << 18
_SO_TIMESTAMPNS = 35  # not in the socket module
_TIMESPEC = struct.Struct("qq")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_TIMESPEC.size) if hasattr(socket, "CMSG_SPACE") else 0
BLOCKED = -1


class Connection(Protocol):
    """One socket; errors are OSErrors."""

    def fileno(self) -> int: ...

    def advance(self) -> int:
        """Continue connecting: 0 when ready to send, else the poll mask to wait for."""
        ...

    def send(self, data: memoryview) -> int:
        """The number of bytes sent, or BLOCKED."""
        ...

    def receive(self) -> tuple[int, int]:
        """The number of bytes in the shared buffer (0: end of the stream, or BLOCKED), and CLOCK_REALTIME in ns."""
        ...

    def close(self) -> None: ...


class ReceiveBuffer:
    """One buffer for all connections; each read is copied out of it before the next one."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(BUFFER_BYTES))
        self.parts = [self.view]


def connect(address: Address, buffer: ReceiveBuffer) -> Connection:
    """Start connecting; raises OSError."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stamped = address.tls is None and _enable_timestamps(sock)
        with contextlib.suppress(BlockingIOError):
            sock.connect(address.sockaddr)
        if address.tls is None:
            return PlainConnection(sock, buffer, stamped)
        return TlsConnection(sock, buffer, address.tls, address.host)
    except OSError:
        sock.close()
        raise


def _enable_timestamps(sock: socket.socket) -> bool:
    """Ask the kernel for receive timestamps; returns whether it supports them."""
    if not _ANCILLARY_BYTES or not hasattr(sock, "recvmsg_into"):
        return False
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    except OSError:
        return False
    # The number may mean something else on other systems, so the option is read back.
    return bool(sock.getsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS))


class PlainConnection:
    """TCP, with kernel timestamps if the system supports them."""

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
        if ancillary:  # timestamps are the only ancillary data that was requested
            seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
            return count, seconds * 1_000_000_000 + nanoseconds
        return count, time.time_ns()

    def close(self) -> None:
        self._sock.close()


class TlsConnection:
    """TLS over TCP; timestamps are the times of the reads that decrypted the bytes."""

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
            # A call returns a whole TLS record (the buffer is larger), so no decrypted bytes are hidden from the poll.
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
