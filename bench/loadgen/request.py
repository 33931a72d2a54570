"""Requests to a target as bytes, and the target's address for the sockets."""

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bench.errors import BenchError
from bench.target.target import Target
from bench.target.tls import tls_context
from bench.workloads.base import RequestSpec

_RESOLVE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """A resolved target, for the socket calls."""

    host: str
    port: int
    path: str  # before /v1, without a trailing slash
    tls: ssl.SSLContext | None
    family: socket.AddressFamily
    sockaddr: tuple[Any, ...]
    query: str = ""

    @property
    def is_local(self) -> bool:
        """Whether a connection costs only a system call: to this machine and without TLS."""
        return self.tls is None and ipaddress.ip_address(self.sockaddr[0]).is_loopback

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = 443 if self.tls else 80
        return host if self.port == default else f"{host}:{self.port}"


def resolve(server: Target | str) -> Address:
    """Look the host up; of several addresses (localhost has two) choose the first that accepts a connection."""
    target = Target.of(server)
    parts = urlsplit(target.base_url)
    host = parts.hostname or ""
    tls = tls_context(target.ca, insecure=target.insecure) if target.is_tls else None
    port = parts.port or (443 if tls else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BenchError(f"cannot find the host {host!r}: {error.strerror or error} (--url)") from None
    family, sockaddr = found[0][0], found[0][4]
    for candidate in found if len(found) > 1 else []:
        with socket.socket(candidate[0], socket.SOCK_STREAM) as probe:
            probe.settimeout(_RESOLVE_TIMEOUT_S)
            if probe.connect_ex(candidate[4]) == 0:
                family, sockaddr = candidate[0], candidate[4]
                break
    return Address(host, port, parts.path, tls, family, tuple(sockaddr), target.query)


def encode_request(target: Target, address: Address, spec: RequestSpec) -> bytes:
    """The whole HTTP request, ready for the socket."""
    if sum(part is not None for part in (spec.prompt_ids, spec.prompt_text, spec.messages)) != 1:
        raise ValueError("a request has either prompt_ids, prompt_text or messages")
    body: dict[str, Any] = {"model": target.model, "max_tokens": spec.output_tokens, "temperature": 0.0}
    if target.ignore_eos:
        body["ignore_eos"] = True
    body["stream"] = True
    if target.stream_options:
        body["stream_options"] = {"include_usage": True}
    if spec.messages is not None:
        path, body["messages"] = "/v1/chat/completions", spec.messages
    else:
        ids = spec.prompt_ids
        path, body["prompt"] = "/v1/completions", list(ids) if ids is not None else spec.prompt_text
    body |= target.extra_body
    content = msgspec.json.encode({key: value for key, value in body.items() if value is not None})
    query = f"?{address.query}" if address.query else ""
    headers = target.all_headers(
        Host=address.host_header, User_Agent="redline", Content_Type="application/json", Accept="text/event-stream",
        Accept_Encoding="identity",
    )  # fmt: skip
    lines = [f"POST {address.path}{path}{query} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + content
