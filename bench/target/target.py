"""The target of a measurement: its URL, keys, headers and TLS settings."""

import re
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from bench.errors import BenchError

_ENDPOINTS = ("/chat/completions", "/completions", "/models")  # after /v1; often copied along with the URL
_PATH_SAFE = "/%:@!$&'()*+,;=~-._"
SECRET = re.compile(r"key|secret|password|credential", re.IGNORECASE)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FRAMING_HEADERS = frozenset({"content-length", "transfer-encoding", "connection", "expect"})
_SET_ELSEWHERE = {
    "stream": "responses are always streamed",
    "prompt": "prompts come from the workload",
    "messages": "prompts come from the workload",
    "model": "use --served-model",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A server that speaks the OpenAI protocol, and how requests are sent to it.

    It applies to measured requests, probe, metrics and health checks. `base_url` may contain /v1, a path before it, a
    query and user:password@; it is stored without /v1, query and user. Raises BenchError naming the wrong flag.
    """

    base_url: str
    model: str = ""
    api_key: str | None = None
    headers: tuple[tuple[str, str], ...] = ()  # sent with every request; they replace default headers
    ca: str | None = None  # CA certificates to trust instead of the system's: a PEM file or a folder
    insecure: bool = False  # skip certificate verification
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # additional request fields; None removes a field
    ignore_eos: bool = True  # request exactly max_tokens tokens
    stream_options: bool = True  # request the usage at the end of the stream
    query: str = ""  # of the URL, added to every request

    def __post_init__(self) -> None:
        base, query, user = _split_url(self.base_url)
        headers = tuple(check_header(name, value) for name, value in self.headers)
        if user and self.api_key is None:
            headers = (("Authorization", "Basic " + b64encode(user.encode()).decode()), *headers)
        if self.api_key is not None:
            check_header("Authorization", self.api_key, "--api-key")
            if not self.api_key.strip():
                raise BenchError("the API key is empty (--api-key)")
        for name, reason in _SET_ELSEWHERE.items():
            if name in self.extra_body:
                raise BenchError(f"{name!r} cannot be set with --extra-body: {reason}")
        object.__setattr__(self, "base_url", base)
        object.__setattr__(self, "query", query or self.query)
        object.__setattr__(self, "headers", headers)

    @classmethod
    def of(cls, server: "Target | str") -> "Target":
        return server if isinstance(server, Target) else cls(server)

    @property
    def is_tls(self) -> bool:
        return self.base_url.startswith("https:")

    @property
    def fixes_lengths(self) -> bool:
        """Whether outputs are requested with exactly the workload's length."""
        return bool(self.extra_body.get("ignore_eos", self.ignore_eos))

    def url(self, path: str) -> str:
        """The URL of a path below the base URL, such as /v1/models."""
        return self.base_url + path + (f"?{self.query}" if self.query else "")

    def all_headers(self, **defaults: str) -> dict[str, str]:
        """The headers of a request: `defaults` (with _ for -), the API key, and `headers`, which replace both."""
        found = {name.replace("_", "-").lower(): (name.replace("_", "-"), value) for name, value in defaults.items()}
        if self.api_key is not None:
            found["authorization"] = ("Authorization", f"Bearer {self.api_key}")
        found |= {name.lower(): (name, value) for name, value in self.headers}
        return dict(found.values())

    def described(self) -> dict[str, Any]:
        """Non-default settings, for result files, without the values of headers, which may be secrets."""
        extra = {key: "***" if SECRET.search(key) else value for key, value in self.extra_body.items()}
        found: dict[str, Any] = {"headers": [name for name, _ in self.headers], "extra_body": extra}
        found |= {"ca": self.ca} | ({"insecure": True} if self.insecure else {})
        found |= {} if self.ignore_eos else {"ignore_eos": False}
        found |= {} if self.stream_options else {"stream_options": False}
        return {key: value for key, value in found.items() if value not in ([], {}, None)}


def clean_url(base_url: str) -> str:
    """`base_url` without trailing slash, /v1, query and user; raises BenchError if it is not an http(s) URL."""
    return _split_url(base_url)[0]


def check_header(name: str, value: str, flag: str = "--header") -> tuple[str, str]:
    """The header as it is sent; raises BenchError if HTTP does not allow it or the load generator sets it itself."""
    name, value = name.strip(), value.strip()
    if not _TOKEN.fullmatch(name):
        raise BenchError(f"{name!r} is not a valid header name ({flag})")
    if name.lower() in _FRAMING_HEADERS:
        raise BenchError(f"the header {name} cannot be set: the load generator sets it ({flag})")
    # The value may be secret, so the message does not contain it.
    if any(ord(letter) < 32 or 126 < ord(letter) < 160 or ord(letter) > 255 for letter in value.replace("\t", " ")):
        raise BenchError(f"the value of {name} contains characters that are not allowed in a header ({flag})")
    return name, value


def _split_url(text: str) -> tuple[str, str, str]:
    """The base URL before /v1, the query, and user:password; raises BenchError."""
    wrong = BenchError(
        f"{_without_password(text)!r} is not a valid server URL; expected something like http://127.0.0.1:8000 (--url)"
    )
    try:
        parts = urlsplit(text.strip())
        port = parts.port
        host = (parts.hostname or "").encode("idna" if not (parts.hostname or "").isascii() else "ascii").decode()
    except ValueError:  # UnicodeError is one
        raise wrong from None
    if parts.scheme not in ("http", "https") or not host or port == 0 or re.search(r"[\s\x00-\x20<>\"\\^`{|}]", host):
        raise wrong
    path = parts.path.rstrip("/")
    for endpoint in _ENDPOINTS:
        path = path.removesuffix("/v1" + endpoint)
    path = quote(path.removesuffix("/v1").rstrip("/"), safe=_PATH_SAFE)
    shown = f"[{host}]" if ":" in host else host
    base = f"{parts.scheme}://{shown}" + (f":{port}" if port is not None else "") + path
    user = "" if parts.username is None else f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return base, quote(parts.query, safe=_PATH_SAFE + "?"), user


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)
