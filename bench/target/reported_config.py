"""The configuration that a server reports of itself, for result files."""

import contextlib
import re
from typing import Any

import httpx

from bench.target.control import ControlClient
from bench.target.target import SECRET, Target

_CARD_NOISE = frozenset({"id", "object", "created", "owned_by", "parent", "permission"})
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_LABEL_NOISE = frozenset({"model_name", "engine"})
_LONGEST = 200  # characters of a value; a longer one is a document, not a setting


def resolved_configuration(server: Target | str, *, timeout_s: float = 10.0) -> dict[str, Any]:
    """The server's version, model card and configuration as plain values; empty if it reports nothing.

    Read from /version, /v1/models, the `…_config_info` metrics (Redline, vLLM) and /get_server_info (SGLang). A page
    that is missing or has another format is skipped. Secrets are never copied.
    """
    found: dict[str, Any] = {}
    with ControlClient(server, timeout_s=timeout_s) as client:
        found |= _plain(_json(client, "/version"))
        models = _json(client, "/v1/models").get("data")
        cards = [card for card in models if isinstance(card, dict)] if isinstance(models, list) else []
        card = next((card for card in cards if card.get("id") == client.target.model), cards[0] if cards else {})
        found |= {k: v for k, v in _plain(card).items() if k not in _CARD_NOISE}
        found |= config_labels(_text(client, "/metrics"))
        if card.get("owned_by") == "sglang":
            found |= _plain(_json(client, "/get_server_info"))
    return found


def config_labels(text: str) -> dict[str, str]:
    """The labels of all `…_config_info` metrics of a Prometheus page, without those whose value is "None"."""
    labels: dict[str, str] = {}
    for line in text.splitlines():
        name = line.partition("{")[0]
        if "{" in line and name.endswith("_config_info") and not line.startswith("#"):
            pairs = {key: value for key, value in _LABEL.findall(line) if value != "None"}
            labels |= {k: v for k, v in _plain(pairs).items() if k not in _LABEL_NOISE}
    return labels


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """The values that are settings: without nested data, empty values and secrets."""
    return {
        str(key): value
        for key, value in data.items()
        if isinstance(value, str | int | float) and 0 < len(str(value)) <= _LONGEST and not SECRET.search(key)
    }


def _text(client: ControlClient, path: str) -> str:
    with contextlib.suppress(httpx.HTTPError):
        response = client.get(path)
        if response.status_code == 200:
            return response.text
    return ""


def _json(client: ControlClient, path: str) -> dict[str, Any]:
    with contextlib.suppress(httpx.HTTPError, ValueError):
        response = client.get(path)
        data = response.json() if response.status_code == 200 else None
        if isinstance(data, dict):
            return data
    return {}
