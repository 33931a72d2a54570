"""Where requests go, and what they look like as bytes."""

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bench.errors import BenchError
from bench.workloads.base import RequestSpec

_RESOLVE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server that speaks the OpenAI protocol; `base_url` is without /v1."""

    base_url: str
    model: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """A target taken apart for the socket calls."""

    host: str
    port: int
    path: str  # before /v1, without a slash at its end
    tls: ssl.SSLContext | None
    family: socket.AddressFamily
    sockaddr: tuple[Any, ...]

    @property
    def is_near(self) -> bool:
        """Whether a connection costs no more than a call of the system: to this machine, and without TLS."""
        return self.tls is None and ipaddress.ip_address(self.sockaddr[0]).is_loopback

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.tls else 80
        return host if self.port == default else f"{host}:{self.port}"


def clean_url(base_url: str) -> str:
    """`base_url` without a slash or /v1 at its end; BenchError if it is no http(s) URL."""
    url = base_url.strip().rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = None
    if not valid:
        raise BenchError(f"{base_url!r} is no URL of a server; expected something like http://127.0.0.1:8000 (--url)")
    return url


def resolve(base_url: str) -> Address:
    """Look the host up once; of several addresses (localhost has two) take the first that accepts a connection now."""
    parts = urlsplit(clean_url(base_url))
    host = parts.hostname or ""
    tls = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if tls else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BenchError(f"the host {host!r} can't be found: {error.strerror or error} (--url)") from None
    family, sockaddr = found[0][0], found[0][4]
    for candidate in found if len(found) > 1 else []:
        with socket.socket(candidate[0], socket.SOCK_STREAM) as probe:
            probe.settimeout(_RESOLVE_TIMEOUT_S)
            if probe.connect_ex(candidate[4]) == 0:
                family, sockaddr = candidate[0], candidate[4]
                break
    return Address(host, port, parts.path, tls, family, tuple(sockaddr))


def encode_request(target: Target, address: Address, spec: RequestSpec) -> bytes:
    """The whole HTTP request, ready for the socket."""
    if sum(part is not None for part in (spec.prompt_ids, spec.prompt_text, spec.messages)) != 1:
        raise ValueError("a request has either prompt_ids, prompt_text or messages")
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": spec.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if spec.messages is not None:
        path, body["messages"] = "/v1/chat/completions", spec.messages
    else:
        path, body["prompt"] = "/v1/completions", spec.prompt_ids if spec.prompt_ids is not None else spec.prompt_text
    content = msgspec.json.encode(body)
    lines = [
        f"POST {address.path}{path} HTTP/1.1",
        f"Host: {address.host_header}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        f"Content-Length: {len(content)}",
    ]
    if target.api_key is not None:
        lines.append(f"Authorization: Bearer {target.api_key}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + content
