"""The outermost middleware: every response has the id of its request, and every exception becomes a response."""

import logging
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.api.error_responses import ApiError, in_anthropic_api

HEADER = b"x-request-id"
ANTHROPIC_HEADER = b"request-id"
LONGEST_ID = 512  # bytes; a longer one is replaced

log = logging.getLogger("redline.api")


class RequestId:
    """Adds X-Request-Id to responses, and answers exceptions of the application with 500."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        added = [(HEADER, request_id)]
        if in_anthropic_api(scope):  # whose clients look for another name
            added.append((ANTHROPIC_HEADER, request_id))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # the client left while it sent its body
        except Exception as error:
            if started:
                raise  # the server closes the connection, which clients do not mistake for the end of a response
            log.error("request %.100r", request_id.decode("latin-1"))
            await ApiError.from_exception(error).response(scope)(scope, receive, send_with_id)


def client_id(scope: Scope) -> str:
    """The client's own id of the request, in its header; empty if it gave none that can be used."""
    given = next((value for name, value in scope["headers"] if name == HEADER), b"")
    usable = 0 < len(given) <= LONGEST_ID and all(0x20 <= byte != 0x7F for byte in given)
    return given.decode("latin-1") if usable else ""


def request_id_of(scope: Scope) -> bytes:
    """The client's id of the request, or a new one."""
    given = client_id(scope)
    return given.encode("latin-1") if given else b"req-" + uuid.uuid4().hex.encode()
