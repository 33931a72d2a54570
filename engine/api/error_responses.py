"""Error responses: {"error": {message, type, param, code}}, or in Anthropic's form; clients raise them."""

import logging
from collections.abc import Mapping

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from engine.api.http_options import ANTHROPIC_PATH
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
# Of Anthropic's API, besides these. It has a status of its own for a server that has too much to do.
ANTHROPIC_OVERLOADED = 529
ANTHROPIC_TYPES = {413: "request_too_large", 504: "timeout_error", ANTHROPIC_OVERLOADED: "overloaded_error"}
OVERLOAD_CODES = frozenset({"overloaded", "queue_full"})
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
        """The body in the form of OpenAI's API, and of our own."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self._shown(), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def anthropic_body(self) -> bytes:
        """The body in the form of Anthropic's API."""
        default = "invalid_request_error" if self.status < 500 else "api_error"
        kind = (TYPES | ANTHROPIC_TYPES).get(self._anthropic_status, default)
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": self._shown()}})

    @property
    def _anthropic_status(self) -> int:
        return ANTHROPIC_OVERLOADED if self.code in OVERLOAD_CODES else self.status

    def _shown(self) -> str:
        """The message as one line of a bounded length."""
        message = " ".join(str(self).splitlines())
        if len(message) > LONGEST_MESSAGE:
            message = message[: LONGEST_MESSAGE - 1] + "…"
        return message.encode("utf-8", "replace").decode()  # a lone surrogate can't be encoded

    def response(self, scope: Scope) -> Response:
        """The response to a request, in the form of the API that its path belongs to."""
        headers = dict(self.headers)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if in_anthropic_api(scope):
            return Response(self.anthropic_body(), self._anthropic_status, headers, media_type="application/json")
        return Response(self.body(), self.status, headers, media_type="application/json")


def path_of(scope: Scope) -> str:
    """The path of a request without the prefix that a reverse proxy adds."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def in_anthropic_api(scope: Scope) -> bool:
    """Whether the path of a request belongs to Anthropic's API, not to OpenAI's or our own."""
    return (path_of(scope) + "/").startswith(ANTHROPIC_PATH + "/")
