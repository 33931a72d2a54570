"""Who may call: clients with a key, and web pages of the origins that are allowed."""

import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.api.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/metrics", "/version", "/openapi.json"})  # answered without a key


class RequireKey:
    """Lets requests through that carry `Authorization: Bearer KEY` with one of the keys."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._path(scope) not in OPEN_PATHS and not self._knows(scope):
            message = "this server needs its API key: Authorization: Bearer KEY"
            refusal = ApiError(401, message, code="invalid_api_key").response()
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    @staticmethod
    def _path(scope: Scope) -> str:
        """Without what a proxy shows in front of it."""
        path: str = scope["path"]
        return path.removeprefix(scope.get("root_path", ""))

    def _knows(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        given = given.strip()
        # All are compared, so that the time taken says nothing about which one was nearly right.
        right = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(right)


def check_media_type(request: Request) -> None:
    """Refuse what a web page of another origin may send without asking: all media types but JSON, and none at all."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        given = f"not {media_type}" if media_type else "which is missing"
        raise ApiError(
            415, f"the header must be Content-Type: application/json, {given}", code="unsupported_media_type"
        )
