"""The HTTP side of one process: its listening socket and uvicorn around the application."""

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.api.app import create_app
from engine.api.errors import ApiError
from engine.api.sse import WRITER, ChunkWriter
from engine.api.state import ApiState
from engine.errors import RedlineError

KEEP_ALIVE_S = 75
# Streams that learn of the core's death, or of a second Ctrl-C, get so long to tell their clients.
LAST_WORDS_S = 2.0
FORCED_GRACE_S = 0.5


def bind(host: str, port: int) -> socket.socket:
    """Take the port before a model is loaded for nothing; RedlineError if it can't be had."""
    return _bind(host, port, shared=False)


def bind_all(host: str, port: int, count: int) -> list[socket.socket]:
    """Take the port for several processes, a socket each, all bound to it; RedlineError if it can't be had.

    On Linux the kernel deals connections out among the sockets. Elsewhere all processes listen on the same one.
    """
    first = bind(host, port)
    if count == 1:
        return [first]
    if sys.platform != "linux":
        return [first, *(first.dup() for _ in range(count - 1))]
    address, port = first.getsockname()[:2]
    first.close()
    _claim(address, port)
    return [_bind(address, port, shared=True) for _ in range(count)]


def _bind(host: str, port: int, *, shared: bool) -> socket.socket:
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


class Server(uvicorn.Server):
    """uvicorn with our own handling of signals: the first lets requests finish, the second doesn't."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def end(self) -> None:
        self.should_exit = True

    def end_now(self) -> None:
        self.should_exit = self.force_exit = True


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's, which also lets the application write chunks without the detours of ASGI."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {WRITER: ChunkWriter(self.transport, self.flow)}  # type: ignore[dict-item]

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser can't read in the form of all other errors; the connection ends."""
        body = ApiError(400, msg).body()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


def http_settings(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """How uvicorn serves the application; `more` are settings of its own, e.g. where it is to listen."""
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # its warnings are of what clients send, who could fill the log
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        **more,
    )


class HttpSide:
    """One API process's side of HTTP, around an open client of the core."""

    def __init__(self, state: ApiState, listener: socket.socket):
        self._client = state.client
        self._listener = listener
        self._server = Server(http_settings(create_app(state)))

    async def serve(self, on_listening: Callable[[str], None]) -> None:
        """Serve to the end, then close the client; `on_listening` gets the URL."""
        host, port = self._listener.getsockname()[:2]
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        try:
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.01)
            if self._server.started:
                on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            await serving
        except OSError as error:
            raise cannot_listen(host, port, error) from error
        finally:
            self._client.close()

    def finish(self) -> None:
        """Take no more requests, and end when those under way are done."""
        self._server.end()

    def end(self, grace_s: float) -> None:
        """End, whatever is still under way after so long."""
        self._server.end()
        asyncio.get_running_loop().call_later(grace_s, self._server.end_now)
