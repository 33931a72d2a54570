"""Probes a server before load is sent: which model to request, its limits, and which server it is."""

import difflib
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast
from urllib.parse import quote

import httpx

from bench.errors import BenchError
from bench.target.control import ControlClient, origin, unreachable
from bench.target.target import Target, clean_url

Kind = Literal["redline", "vllm", "sglang", "unknown"]

_MODELS = "/v1/models"
_NO_LIST = frozenset({400, 403, 404, 405, 410, 501})  # of a server without a model list
_MOST_NAMES = 8


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server reports about the model to request."""

    model: str
    max_model_len: int | None
    vocab_size: int | None
    kind: Kind
    target: Target | None = field(default=None, compare=False)  # the server with that model, after redirects
    notes: tuple[str, ...] = field(default=(), compare=False)  # messages about assumptions


def probe_server(server: Target | str, *, timeout_s: float = 10.0) -> ServerInfo:
    """Read GET /v1/models and choose the model; raises BenchError that names the flag to change.

    A target that names its model does not need a list, but must be on the list if there is one.
    """
    target = Target.of(server)
    notes: list[str] = []
    try:
        target, answer = _list_models(target, timeout_s, notes)
        cards = _cards(answer)
        if answer.status_code == 401 or (answer.status_code == 403 and not target.model):
            status = answer.status_code
            raise BenchError(
                f"the server at {target.base_url} rejected the API key with HTTP {status} (--api-key, --header)"
            )
        if not cards:
            card = _assumed(target, answer, notes)
        else:
            card = _chosen(target, cards, timeout_s, notes)
    except httpx.HTTPError as error:
        raise unreachable(target, error, timeout_s) from None
    owner = card.get("owned_by")
    kind = cast(Kind, owner) if owner in ("redline", "vllm", "sglang") else "unknown"
    target = replace(target, model=str(card["id"]))
    return ServerInfo(
        target.model, _whole(card.get("max_model_len")), _whole(card.get("vocab_size")), kind, target, tuple(notes)
    )


def _list_models(target: Target, timeout_s: float, notes: list[str]) -> tuple[Target, httpx.Response]:
    """The response with the list, and its target: a server may redirect to another path of its own or to TLS."""
    for _ in range(2):
        with ControlClient(target, timeout_s=timeout_s) as client:
            answer = client.get(_MODELS)
        place = answer.headers.get("location")
        found = answer.next_request.url if answer.next_request is not None else answer.url
        path = found.path.rstrip("/")
        if not path.endswith(_MODELS):
            raise BenchError(f"{target.url(_MODELS)} redirects to {place or found}, which is not a model list (--url)")
        base = clean_url(str(found.copy_with(path=path, query=None)))
        if base == target.base_url:
            break
        if origin(base)[1] != origin(target.base_url)[1]:
            raise BenchError(f"the server at {target.base_url} redirects to {base}: use that address (--url)")
        notes.append(f"{target.base_url} redirects to {base}, which is measured")
        target = replace(target, base_url=base)
        if answer.next_request is None:
            break
    return target, answer


def _cards(answer: httpx.Response) -> list[dict[str, Any]]:
    try:
        entries = answer.json()["data"] if answer.status_code == 200 else []
        return [card for card in entries if isinstance(card, dict) and card.get("id")]
    except (ValueError, LookupError, TypeError):
        return []


def _assumed(target: Target, answer: httpx.Response, notes: list[str]) -> dict[str, Any]:
    """A card for the requested model if the server has no list."""
    result = f"answered HTTP {answer.status_code}" if answer.status_code != 200 else "lists no models"
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        raise BenchError(f"{target.url(_MODELS)} {result}: the server is not ready. Repeat the command once it is")
    if answer.status_code != 200 and answer.status_code not in _NO_LIST:
        raise BenchError(f"{target.url(_MODELS)} {result}: is this an OpenAI-compatible server? (--url)")
    if not target.model:
        raise BenchError(
            f"{target.url(_MODELS)} {result}: is this an OpenAI-compatible server? (--url) "
            "If it lists no models, name the model with --served-model"
        )
    notes.append(f"{target.url(_MODELS)} {result}: assuming that the model {target.model!r} exists")
    return {"id": target.model}


def _chosen(target: Target, cards: list[dict[str, Any]], timeout_s: float, notes: list[str]) -> dict[str, Any]:
    """The card of the requested model, else of the first one."""
    names = [str(card["id"]) for card in cards]
    if not target.model:
        if len(names) > 1:
            notes.append(f"the server lists {_joined(names)}: using {names[0]} (--served-model selects another)")
        return cards[0]
    if target.model in names:
        return cards[names.index(target.model)]
    with ControlClient(target, timeout_s=timeout_s) as client:
        answer = client.get(f"{_MODELS}/{quote(target.model, safe='/')}")
    try:
        card = answer.json() if answer.status_code == 200 else {}
    except ValueError:
        card = {}
    if isinstance(card, dict) and card.get("id") == target.model:  # servable, though not listed
        return card
    close = difflib.get_close_matches(target.model, names, 1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    raise BenchError(f"the server has no model {target.model!r}{meant}; it lists {_joined(names)} (--served-model)")


def _joined(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
