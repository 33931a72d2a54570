"""Streamed responses (server-sent events), and the end of a request whose client disconnects.

The streamed path is hot: one write per step and request, of bytes made from a template. If the server provides a
`ChunkWriter`, the write happens while the core's message is processed, without waking a task. For a client that reads
slowly, deltas are merged into one event until it has read enough.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.api.error_responses import ApiError
from engine.frontend.streams import Delta, RequestStream

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


WRITER = "redline.writer"  # the ASGI extension that holds a ChunkWriter
FAILURE = "redline.failure"  # in the scope of a streamed response: renders an error as its last event


class FlowControl(Protocol):
    """uvicorn's state of a connection's write buffer."""

    write_paused: bool

    async def drain(self) -> None: ...


class ChunkWriter:
    """Writes chunks of a response directly to the connection, once its headers are sent."""

    __slots__ = ("_flow", "_transport")

    def __init__(self, transport: asyncio.WriteTransport, flow: FlowControl):
        self._transport = transport
        self._flow = flow

    @property
    def ready(self) -> bool:
        """Whether the client has read enough of what was written."""
        return not self._flow.write_paused

    async def wait_ready(self) -> None:
        await self._flow.drain()

    def write(self, body: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))


class Events(Protocol):
    """Renders the server-sent events of one request."""

    def begin(self) -> bytes:
        """The events before the first delta."""
        ...

    def render_all(self, deltas: list[Delta]) -> bytes:
        """All deltas since the last write."""
        ...

    def end(self) -> bytes:
        """The events after the last delta."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that does not end properly."""
        ...


class EventStream(Response):
    """Sends deltas as events; aborts the request if its client disconnects."""

    def __init__(self, stream: RequestStream, events: Events):
        self.status_code = 200
        self.background = None
        self.body = b""
        self.raw_headers = list(HEADERS)
        self._stream = stream
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(close_on_disconnect(receive, self._stream))
        writer: ChunkWriter | None = scope.get("extensions", {}).get(WRITER)
        scope[FAILURE] = self._events.failure
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                if begin := self._events.begin():
                    await send({"type": "http.response.body", "body": begin, "more_body": True})
                await (self._send_all(send) if writer is None else self._write_all(writer))
                last = self._events.end()
            except Exception as error:
                last = self._events.failure(ApiError.from_exception(error))  # the status is already sent
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            watch.cancel()
            self._stream.close()

    async def _send_all(self, send: Send) -> None:
        async for deltas in self._stream:
            if data := self._events.render_all(deltas):
                await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _write_all(self, writer: ChunkWriter) -> None:
        stream, render = self._stream, self._events.render_all

        def push() -> bool:
            if not writer.ready:
                return False
            data = render(stream.take_deltas())
            if data:  # a chunk without bytes would end the response
                writer.write(data)
            return True

        stream.sink = push
        try:
            while True:
                await writer.wait_ready()
                if stream.has_deltas:
                    push()
                elif not stream.is_open:
                    return
                else:
                    await stream.wait()
        finally:
            stream.sink = None


async def close_on_disconnect(receive: Receive, stream: RequestStream) -> None:
    await _disconnected(receive)
    stream.close()


Result = TypeVar("Result")


async def run_until_disconnect(
    receive: Receive, stream: RequestStream, work: Callable[[], Awaitable[Result]]
) -> Result:
    """Run `work`, which reads the stream to its end; aborts the stream if the client disconnects."""
    watch: asyncio.Future[Any] = asyncio.ensure_future(close_on_disconnect(receive, stream))
    try:
        return await work()
    finally:
        watch.cancel()
        stream.close()


async def cancel_on_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`, and cancel it if the client disconnects; then ApiError 499 ends the request."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has disconnected")
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
