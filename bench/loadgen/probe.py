"""Asks a server what it is before load is sent."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import httpx

from bench.errors import BenchError
from bench.loadgen.target import clean_url

Kind = Literal["redline", "vllm", "sglang", "unknown"]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The first model a server lists."""

    model: str
    max_model_len: int | None
    vocab_size: int | None
    kind: Kind


def probe_server(base_url: str, api_key: str | None = None, *, timeout_s: float = 10.0) -> ServerFacts:
    """Read GET /v1/models; raises BenchError that names --url or --api-key when that doesn't work."""
    url = clean_url(base_url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key is not None else {}
    try:
        # The measured path uses no proxy, so what is asked here must not either.
        with httpx.Client(trust_env=False, timeout=timeout_s) as client:
            answer = client.get(f"{url}/v1/models", headers=headers)
    except httpx.TimeoutException:
        raise BenchError(f"the server at {url} does not answer within {timeout_s:g} s (--url)") from None
    except httpx.HTTPError as error:
        raise BenchError(f"no server can be reached at {url}: {str(error) or type(error).__name__} (--url)") from None
    if answer.status_code in (401, 403):
        raise BenchError(f"the server at {url} refuses the key with HTTP {answer.status_code} (--api-key)")
    if answer.status_code != 200:
        raise BenchError(f"{url}/v1/models answers HTTP {answer.status_code}: is this an OpenAI-style server? (--url)")
    return _facts(url, answer)


def _facts(url: str, answer: httpx.Response) -> ServerFacts:
    try:
        card: dict[str, Any] = answer.json()["data"][0]
        model = card["id"]
    except (ValueError, LookupError, TypeError):
        raise BenchError(f"{url}/v1/models lists no model: is this an OpenAI-style server? (--url)") from None
    owner = card.get("owned_by")
    kind = cast(Kind, owner) if owner in ("redline", "vllm", "sglang") else "unknown"
    return ServerFacts(str(model), _whole(card.get("max_model_len")), _whole(card.get("vocab_size")), kind)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
