"""--request-timeout: requests that take too long end with an error, and free their slot."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.api.error_responses import ApiError
from engine.api.event_stream import FAILURE
from engine.frontend.connect import EngineClient


class RequestTimeout:
    """Cancels requests that are not answered in full within a time from their arrival.

    A request without an answer yet gets 504. A stream ends with the error event of its API. The time includes that of
    the body, of media to be fetched, and of waiting in the queue.
    """

    def __init__(self, app: ASGIApp, seconds: float, client: EngineClient):
        self._app = app
        self._seconds = seconds
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        response = _Response(send)
        try:
            async with asyncio.timeout(self._seconds) as timer:
                await self._app(scope, receive, response.send)
        except TimeoutError:
            if not timer.expired() or response.ended:
                raise
            self._client.stats.count_event("timeout")
            await self._end(response, scope, receive)

    async def _end(self, response: "_Response", scope: Scope, receive: Receive) -> None:
        error = ApiError(
            504,
            f"the request was not finished within {self._seconds:g} s of its arrival (--request-timeout)",
            code="request_timeout",
            headers={"x-should-retry": "false"},  # the clients of both APIs would send it again at once
        )
        if not response.started:
            await error.response(scope)(scope, receive, response.send)
        elif FAILURE in scope:
            last = scope[FAILURE](error)
            await response.send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            raise error  # the server closes the connection


class _Response:
    """What has been sent of a response."""

    def __init__(self, send: Send):
        self._send = send
        self.started = self.ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self._send(message)
