"""Responses that run by hand on ASGI: streamed (server-sent events) and whole, both ended by a client that leaves.

The streamed path is hot: one write for each step of a request, bytes rendered by the caller, nothing parsed.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.api.errors import ApiError
from engine.errors import RedlineError
from engine.frontend.streams import RequestStream

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """Sends events as they are rendered; a client that leaves ends the request."""

    def __init__(self, stream: RequestStream, events: AsyncIterator[bytes]):
        self.status_code = 200
        self.background = None
        self.body = b""
        self.raw_headers = list(HEADERS)
        self._stream = stream
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        watch = asyncio.ensure_future(close_on_disconnect(receive, self._stream))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            last = DONE
            try:
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except RedlineError as error:  # the status is out already: the error is an event
                last = b"data: " + ApiError.of(error).body() + b"\n\n" + DONE
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            watch.cancel()
            self._stream.close()


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
