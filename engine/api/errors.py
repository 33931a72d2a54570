"""Errors on the wire: {"error": {message, type, param, code}}, which OpenAI's clients turn into exceptions."""

import msgspec
from starlette.responses import Response

from engine.errors import EngineDeadError, RedlineError, RequestError

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error"}


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """The answer to an error of the engine's."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestError):
            return cls(400, str(error), param=error.field)
        if isinstance(error, EngineDeadError):
            return cls(503, str(error), code="engine_dead")
        return cls(500, str(error) if isinstance(error, RedlineError) else f"{type(error).__name__}: {error}")

    def body(self) -> bytes:
        kind = TYPES.get(self.status, "server_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return Response(self.body(), self.status, headers, media_type="application/json")
