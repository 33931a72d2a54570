"""The outermost layer of the application: every answer carries its request's id, and no failure gets past it."""

import logging
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.api.errors import ApiError

HEADER = b"x-request-id"
LONGEST_ID = 512  # bytes; of a longer one nothing is echoed

log = logging.getLogger("redline.api")


class RequestId:
    """Echoes X-Request-Id, or makes one up, and answers 500 to what the application raises."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = id_of(scope)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # while it sent its body: there is nobody to answer
        except Exception as error:
            if started:
                raise  # the server cuts the connection, which no client takes for the end of an answer
            log.error("request %.100r", request_id.decode("latin-1"))
            await ApiError.of(error).response()(scope, receive, send_with_id)


def id_of(scope: Scope) -> bytes:
    """The id that a client gave its request, or a new one."""
    given = next((value for name, value in scope["headers"] if name == HEADER), b"")
    usable = 0 < len(given) <= LONGEST_ID and all(0x20 <= byte != 0x7F for byte in given)
    return given if usable else b"req-" + uuid.uuid4().hex.encode()
