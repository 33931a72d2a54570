"""The server's port: bound before the model is loaded, and answered with 503 until the server is up."""

import contextlib
import errno
import selectors
import socket
import ssl
import sys
import threading
import time
from types import TracebackType

from engine.api.http_options import ANTHROPIC_PATH
from engine.errors import RedlineError

BACKLOG = 2048  # connections that the kernel keeps until they are accepted; uvicorn's default
STARTING = (
    b'{"error":{"message":"the server is starting","type":"server_error","param":null,"code":"starting"},'
    b'"status":"starting"}'
)
ANTHROPIC_STARTING = b'{"type":"error","error":{"type":"api_error","message":"the server is starting"}}'
HEAD = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n"
)
PATIENCE_S = 1.0  # for a client to send its request


def bind(host: str, port: int) -> socket.socket:
    """Bind and listen. Raises RedlineError if the port is in use, before a model is loaded.

    The socket must listen: two servers can bind one port while none listens, and the second would fail after loading.
    """
    return _bind(host, port, shared=False)


def bind_all(host: str, port: int, count: int) -> list[socket.socket]:
    """Bind one socket per process to the port. Raises RedlineError if it is in use.

    On Linux, the kernel distributes connections among the sockets that listen. Only the first one listens until its
    process serves, then the others. On other systems, all processes listen on the same socket.
    """
    first = bind(host, port)
    if count == 1:
        return [first]
    if sys.platform != "linux":
        return [first, *(first.dup() for _ in range(count - 1))]
    address, port = first.getsockname()[:2]
    first.close()
    _claim(address, port)
    sockets = [_bind(address, port, shared=True)]
    return sockets + [_bind(address, port, shared=True, listen=False) for _ in range(count - 1)]


def _bind(host: str, port: int, *, shared: bool, listen: bool = True) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RedlineError(f"--host {host} can't be used: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
        if listen:
            bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        raise cannot_listen(host, port, error) from error
    return bound


_claims: list[socket.socket] = []  # held until the process ends


def _claim(address: str, port: int) -> None:
    """Keep other servers that share ports from sharing this one: they would get a part of its connections."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0redline-{address}-{port}")
    except OSError as error:
        claim.close()
        raise cannot_listen(address, port, error) from error
    _claims.append(claim)


def cannot_listen(host: str, port: int, error: OSError) -> RedlineError:
    if error.errno == errno.EADDRINUSE:
        return RedlineError(
            f"port {port} on {host} is in use: stop the process that listens there, or use another --port"
        )
    return RedlineError(f"can't listen on {host}:{port}: {error.strerror or error} (--host, --port)")


class StartingResponder:
    """Answers every request on a listening socket with 503 while the server starts, from a separate thread.

    Otherwise clients would connect and wait while the model loads. A context manager; the socket still listens
    afterwards. `tls` is the context for HTTPS.
    """

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext | None = None):
        self._listener = listener
        self._tls = tls
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="starting-answers", daemon=True)

    def __enter__(self) -> None:
        self._listener.setblocking(False)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._wake_write.close()
        self._thread.join()
        self._wake_read.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake_read in ready:
                    return
                with contextlib.suppress(OSError):  # the client left
                    self._answer(self._listener.accept()[0])

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_S)
        with connection if self._tls is None else self._tls.wrap_socket(connection, server_side=True) as connection:
            # All is read: unread data would reset the connection before the response is sent.
            target = connection.recv(1 << 16).partition(b"\r\n")[0]
            body = ANTHROPIC_STARTING if ANTHROPIC_PATH.encode() in target else STARTING
            connection.sendall(HEAD % len(body) + body)
            connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + PATIENCE_S
            while connection.recv(1 << 16) and time.monotonic() < end:  # the rest of a body
                pass
