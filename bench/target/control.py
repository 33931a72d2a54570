"""Control requests (models, health, metrics, tokenization) to the target, with the same headers and TLS settings."""

import urllib.request
from typing import Any
from urllib.parse import urlsplit

import httpx

from bench.errors import BenchError
from bench.target.target import Target
from bench.target.tls import tls_context

_MOST_REDIRECTS = 3


class ControlClient:
    """A client of one target. Redirects to other servers are not followed, since they would receive the key."""

    def __init__(self, server: Target | str, *, timeout_s: float = 10.0):
        self.target = Target.of(server)
        # The measured requests use no proxy, so control requests must not either.
        self._http = httpx.Client(
            headers=self.target.all_headers(User_Agent="redline"),
            verify=tls_context(self.target.ca, insecure=self.target.insecure) if self.target.is_tls else False,
            timeout=timeout_s,
            trust_env=False,
        )

    def __enter__(self) -> "ControlClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def get(self, path: str) -> httpx.Response:
        """GET a path below the target's base URL, or a full URL; raises httpx.HTTPError."""
        return self._send(self._http.build_request("GET", self._url(path)))

    def post(self, path: str, content: Any) -> httpx.Response:
        """POST JSON to a path below the target's base URL; raises httpx.HTTPError."""
        return self._send(self._http.build_request("POST", self._url(path), json=content))

    def _url(self, path: str) -> str:
        return path if "://" in path else self.target.url(path)

    def _send(self, request: httpx.Request) -> httpx.Response:
        response = self._http.send(request)
        for _ in range(_MOST_REDIRECTS):
            following = response.next_request
            if following is None or origin(str(following.url)) != origin(str(request.url)):
                break
            response = self._http.send(following)
        return response


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def unused_proxy(target: Target) -> str:
    """A message if the environment names a proxy for the target's URL, which is not used; else ""."""
    scheme, host, port = origin(target.base_url)
    proxies = urllib.request.getproxies_environment()
    name = scheme if scheme in proxies else "all"
    if name not in proxies or _bypasses_proxy(f"{host}:{port}", proxies):
        return ""
    return (
        f"{name.upper()}_PROXY is ignored: requests go directly to {host}, because a proxy's delays would be measured"
    )


def _bypasses_proxy(host: str, proxies: dict[str, str]) -> bool:
    return bool(urllib.request.proxy_bypass_environment(host, proxies))  # type: ignore[attr-defined]


def reason_of(error: httpx.HTTPError) -> str:
    """Why there is no response, in words."""
    reason = str(error) or type(error).__name__
    return "it does not use TLS: use http:// in place of https://" if "WRONG_VERSION_NUMBER" in reason else reason


def unreachable(target: Target, error: httpx.HTTPError, timeout_s: float) -> BenchError:
    """The error for a request without a response; names the flag to change."""
    url = target.base_url
    if isinstance(error, httpx.TimeoutException):
        return BenchError(f"the server at {url} did not answer within {timeout_s:g} s (--url)")
    reason = reason_of(error)
    flags = "--ca or --insecure" if "certificate" in reason.lower() else "--url"
    proxy = unused_proxy(target)
    return BenchError(f"cannot reach a server at {url}: {reason}{'; ' + proxy if proxy else ''} ({flags})")
