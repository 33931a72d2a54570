"""Error responses: {"error": {message, type, param, code}}, which OpenAI's clients turn into exceptions."""

import logging
from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from engine.errors import (
    ContextLengthError,
    EngineDeadError,
    NotServedError,
    OverloadedError,
    ProcessingError,
    RequestError,
    SharedMemoryFullError,
)

log = logging.getLogger("redline.api")

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
LONGEST_MESSAGE = 2000  # characters; a message quotes what the client sent
INTERNAL = "internal error; see the server's log for this X-Request-Id"


class ApiError(Exception):
    """A response other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def from_exception(cls, error: Exception) -> "ApiError":
        """The response to an error of the engine; an unexpected one is a 500 without its message."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, NotServedError):
            return cls(404, str(error), param=error.field, code="model_not_found")
        if isinstance(error, RequestError):
            code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
            return cls(400, str(error), param=error.field, code=code)
        if isinstance(error, EngineDeadError):
            return cls(503, str(error), code="engine_dead")
        if isinstance(error, OverloadedError):
            return cls(503, str(error), code="overloaded")
        if isinstance(error, ProcessingError):
            status = 503 if isinstance(error, SharedMemoryFullError) else 500
            return cls(status, str(error), code="processing_failed")
        log.error("a request failed", exc_info=error)
        return cls(500, INTERNAL, code="internal_error")

    def body(self) -> bytes:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = " ".join(str(self).splitlines())
        if len(message) > LONGEST_MESSAGE:
            message = message[: LONGEST_MESSAGE - 1] + "…"
        # A lone surrogate can't be encoded.
        message = message.encode("utf-8", "replace").decode()
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        headers = dict(self.headers)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, media_type="application/json")
