"""The HTTP server of one API process: its listening socket, and uvicorn around the application."""

import asyncio
import contextlib
import http
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from engine.api.app import create_app
from engine.api.error_responses import ApiError
from engine.api.event_stream import WRITER, ChunkWriter
from engine.api.ports import cannot_listen
from engine.api.state import ApiState

KEEP_ALIVE_S = 75
MAX_HEAD_BYTES = 64 << 10
LINGER_S = 10.0  # how long the rest of a body is read after its request was answered
# Time for streams to send their error to clients after the core's death, or after a second Ctrl-C.
ERROR_GRACE_S = 2.0
FORCED_GRACE_S = 0.5


class UvicornServer(uvicorn.Server):
    """uvicorn without its handling of signals, which is in `server_run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def finish(self) -> None:
        self.should_exit = True

    def abort(self) -> None:
        self.should_exit = self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # its client may not read what it is sent


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with direct writes of chunks past ASGI and a limit for request headers.

    The rest of a body that arrives after its request was answered is read and dropped for a while. If the connection
    was closed at once, a client that is still sending would not get the response.
    """

    _head_bytes: int | None = None  # of the headers that are being received
    _body_complete = True

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse(431, f"the request's headers have more than {MAX_HEAD_BYTES:,} bytes")

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body_complete = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._body_complete:
            self.loop.call_later(LINGER_S, self._end_linger, self.cycle)

    def _end_linger(self, cycle: RequestResponseCycle) -> None:
        if self.cycle is cycle and not self._body_complete and not self.transport.is_closing():
            self.transport.close()

    def on_message_begin(self) -> None:
        self._head_bytes, self._body_complete = 0, False
        super().on_message_begin()
        self.scope["extensions"] = {WRITER: ChunkWriter(self.transport, self.flow)}  # type: ignore[dict-item]

    def send_400_response(self, msg: str) -> None:
        """Answer a request that the parser can't read, in the form of all other errors, and close the connection."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        body = ApiError(status, message).body()
        head = b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\nconnection: close\r\n"
        head %= status, http.HTTPStatus(status).phrase.encode()
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()


def uvicorn_config(app: ASGIApp, **more: Any) -> uvicorn.Config:
    """uvicorn's configuration for the application; `more` are further settings, e.g. the address."""
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",  # clients can cause warnings and would fill the log
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        **more,
    )


class HttpServer:
    """Serves HTTP on one listening socket, for a client of the engine."""

    def __init__(self, state: ApiState, listener: socket.socket):
        self._client = state.client
        self._responses = state.responses
        self._listener = listener
        options = state.options
        self._scheme = "https" if options.ssl_certfile else "http"
        tls = {"ssl_certfile": options.ssl_certfile, "ssl_keyfile": options.ssl_keyfile} if options.ssl_certfile else {}
        self._server = UvicornServer(uvicorn_config(create_app(state), **tls))

    async def serve(self, on_listening: Callable[[str], None]) -> None:
        """Serve until the server ends, then close the client; `on_listening` gets the URL."""
        await self._wait_for_inputs()
        await self._responses.open()
        host, port = self._listener.getsockname()[:2]
        serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
        try:
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.01)
            if self._server.started:
                on_listening(f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{port}")
            await serving
        except OSError as error:
            raise cannot_listen(host, port, error) from error
        finally:
            self._responses.close()
            self._client.close()

    async def _wait_for_inputs(self) -> None:
        """Wait until multimodal inputs can be processed, else the first of them would wait for imports."""
        try:
            if self._client.inputs is not None:
                await self._client.inputs.started()
        except BaseException:
            self._client.close()
            raise

    def finish(self) -> None:
        """Accept no more requests, and end when the running ones are done."""
        self._server.finish()

    def end(self, grace_s: float) -> None:
        """As `finish`, but abort what still runs after `grace_s` seconds."""
        self._server.finish()
        asyncio.get_running_loop().call_later(grace_s, self._server.abort)
