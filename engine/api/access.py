"""Access control: API keys, and the media type that keeps out web pages of other origins."""

import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.api.error_responses import ApiError, path_of

KEY = "redline.key"  # the number of a request's key, in its scope
# Served without a key; the pages ask for one.
OPEN_PATHS = frozenset({"/health", "/ping", "/load", "/ready", "/metrics", "/version", "/openapi.json", "/", "/docs"})

NO_KEY = "an API key is required: send the header Authorization: Bearer KEY or X-API-Key: KEY"
WRONG_KEY = "the API key is not one of this server's"


class RequireKey:
    """Rejects requests without a key in `Authorization: Bearer KEY` or, as of Anthropic's clients, `X-API-Key`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope) not in OPEN_PATHS:
            given = _keys_of(scope)
            key = self._number(given)
            if key is None:
                message = WRONG_KEY if any(given) else NO_KEY
                refusal = ApiError(401, message, code="invalid_api_key").response(scope)
                await refusal(scope, receive, send)
                return
            scope[KEY] = key
        await self._app(scope, receive, send)

    def _number(self, given: list[bytes]) -> int | None:
        """The number of the first key that is right; None if none is."""
        # All keys are compared, so that the time does not depend on which one matches.
        right = [[hmac.compare_digest(one, key) for key in self._keys] for one in given]
        return next((found.index(True) for found in right if True in found), None)


def _keys_of(scope: Scope) -> list[bytes]:
    """What a request has in the two places for a key; empty if nothing."""
    headers = dict(scope["headers"])
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    return [headers.get(b"x-api-key", b"").strip(), bearer.strip() if scheme.lower() == b"bearer" else b""]


def is_simple(request: Request) -> bool:
    """Whether a request has no body and comes from no web page: browsers send the header Origin with each POST."""
    headers = request.headers
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    return not has_body and "origin" not in headers and "content-type" not in headers


def check_media_type(request: Request) -> None:
    """Raise ApiError 415 for all types but JSON: a web page of any origin may send them without a CORS check."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        given = f"not {media_type}" if media_type else "which is missing"
        raise ApiError(
            415, f"the header must be Content-Type: application/json, {given}", code="unsupported_media_type"
        )
