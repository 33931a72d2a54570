"""The server's port: taken before the model is loaded, and answered with 503 until the server is up."""

import contextlib
import errno
import selectors
import socket
import ssl
import sys
import threading
import time
from types import TracebackType

from engine.errors import RedlineError

BACKLOG = 2048  # connections that the kernel keeps until they are accepted, as uvicorn has it
STARTING = (
    b'{"error":{"message":"the server is starting","type":"server_error","param":null,"code":"starting"},'
    b'"status":"starting"}'
)
ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
    b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(STARTING), STARTING)
)
PATIENCE_S = 1.0  # a client that connects has so long to send its request


def bind(host: str, port: int) -> socket.socket:
    """Take the port before a model is loaded for nothing; RedlineError if it can't be had.

    The socket listens: two servers can bind one port as long as none does, and the second would fail after loading.
    """
    return _bind(host, port, shared=False)


def bind_all(host: str, port: int, count: int) -> list[socket.socket]:
    """Take the port for several processes, a socket each, all bound to it; RedlineError if it can't be had.

    On Linux the kernel deals connections out among the sockets that listen: only the first does until the others are
    served. Elsewhere all processes listen on the same one.
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
    """Keep other servers that share their ports off this one: the kernel would deal connections out to them too."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(f"\0redline-{address}-{port}")
    except OSError as error:
        claim.close()
        raise cannot_listen(address, port, error) from error
    _claims.append(claim)


def cannot_listen(host: str, port: int, error: OSError) -> RedlineError:
    if error.errno == errno.EADDRINUSE:
        return RedlineError(f"port {port} on {host} is in use: stop what listens there, or give another --port")
    return RedlineError(f"can't listen on {host}:{port}: {error.strerror or error} (--host, --port)")


class StartingAnswers:
    """Answers every request on a listening socket with 503 while the server starts, from a thread of its own.

    Without it clients would connect and then wait for as long as the model takes to load. `with` begins and ends it;
    the socket goes on listening. `tls` is the context of a server that speaks HTTPS.
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
            connection.recv(1 << 16)  # what isn't read would reset the connection, and the answer with it
            connection.sendall(ANSWER)
            connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + PATIENCE_S
            while connection.recv(1 << 16) and time.monotonic() < end:  # the rest of a body
                pass
