"""Responses that run by hand on ASGI: streamed (server-sent events) and whole, both ended by a client that leaves.

The streamed path is hot: one write for each step of a request, of bytes made from a template. Where the server offers
a `ChunkWriter`, the write happens while the core's message is booked, and no task wakes for it. A client that doesn't
keep up is written to again when it has read; what came meanwhile is one event then.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.api.errors import ApiError
from engine.api.render import Chunks
from engine.frontend.streams import RequestStream

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


WRITER = "redline.writer"  # the extension of a scope that holds a ChunkWriter


class Flow(Protocol):
    """What is known of a connection's buffer."""

    write_paused: bool

    async def drain(self) -> None: ...


class ChunkWriter:
    """Writes chunks of a response whose head is out, past ASGI."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, transport: asyncio.WriteTransport, flow: Flow):
        self._transport = transport
        self._flow = flow

    @property
    def ready(self) -> bool:
        """Whether the client has taken enough of what was written."""
        return not self._flow.write_paused

    async def until_ready(self) -> None:
        await self._flow.drain()

    def write(self, body: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class EventStream(Response):
    """Sends events as they come; a client that leaves ends the request."""

    def __init__(self, stream: RequestStream, chunks: Chunks):
        self.status_code = 200
        self.background = None
        self.body = b""
        self.raw_headers = list(HEADERS)
        self._stream = stream
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(close_on_disconnect(receive, self._stream))
        writer: ChunkWriter | None = scope.get("extensions", {}).get(WRITER)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await (self._send_all(send) if writer is None else self._write_all(writer))
                last = self._chunks.end() + DONE
            except Exception as error:
                # The status is out already, so the error is an event. [DONE] would call the answer complete: OpenAI's
                # client raises at the event, and one that knows only chunks sees a stream without an end.
                last = b"data: " + ApiError.of(error).body() + b"\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            watch.cancel()
            self._stream.close()

    async def _send_all(self, send: Send) -> None:
        async for deltas in self._stream:
            await send({"type": "http.response.body", "body": self._chunks.render_all(deltas), "more_body": True})

    async def _write_all(self, writer: ChunkWriter) -> None:
        stream, render = self._stream, self._chunks.render_all

        def push() -> bool:
            if not writer.ready:
                return False
            writer.write(render(stream.take()))
            return True

        stream.sink = push
        try:
            while True:
                await writer.until_ready()
                if stream.has_new:
                    push()
                elif not stream.open:
                    return
                else:
                    await stream.woken()
        finally:
            stream.sink = None


async def close_on_disconnect(receive: Receive, stream: RequestStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close()


Result = TypeVar("Result")


async def until_disconnect(receive: Receive, stream: RequestStream, work: Callable[[], Awaitable[Result]]) -> Result:
    """Run `work`, which reads the stream to its end; a client that leaves ends the stream, and so the work."""
    watch: asyncio.Future[Any] = asyncio.ensure_future(close_on_disconnect(receive, stream))
    try:
        return await work()
    finally:
        watch.cancel()
        stream.close()
