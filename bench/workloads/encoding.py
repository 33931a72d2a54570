"""Tokenization of texts, with a local tokenizer or by the server."""

from pathlib import Path
from typing import Any

import httpx

from bench.errors import BenchError
from bench.target.control import ControlClient
from bench.target.target import Target
from bench.workloads.base import Encode
from engine.errors import ModelError
from engine.pretrained import load_auto_tokenizer

_TIMEOUT_S = 60.0


def local_tokenizer(name: str) -> Any:
    """The tokenizer of a folder, a tokenizer.json or a hub id; has encode(text, add_special_tokens=…)."""
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BenchError(f"{path} cannot be read as a tokenizer: {error} (--tokenizer)") from None
    try:
        return load_auto_tokenizer(name)
    except ModelError as error:
        raise BenchError(str(error)) from None


def tokenizer_size(tokenizer: Any) -> int:
    return int(tokenizer.get_vocab_size() if hasattr(tokenizer, "get_vocab_size") else len(tokenizer))


def local_encoder(tokenizer: Any) -> Encode:
    """Tokenize with a tokenizer from local_tokenizer()."""

    def encode(texts: list[str]) -> list[list[int]]:
        found = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [list(getattr(ids, "ids", ids)) for ids in found]

    return encode


def server_encoder(target: Target) -> Encode:
    """Tokenize with the server's POST /tokenize (Redline, vLLM); sends no request before it is used."""
    url, model = target.base_url + "/tokenize", target.model

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            with ControlClient(target, timeout_s=_TIMEOUT_S) as client:
                return [_ids(client, url, {"model": model, "prompt": t, "add_special_tokens": False}) for t in texts]
        except httpx.HTTPError as error:
            raise BenchError(f"no response from {url}: {error or type(error).__name__}; pass --tokenizer") from None

    return encode


def _ids(client: ControlClient, url: str, content: dict[str, Any]) -> list[int]:
    response = client.post("/tokenize", content)
    if response.status_code != 200:
        raise BenchError(f"{url} answered HTTP {response.status_code}: the server cannot tokenize; pass --tokenizer")
    try:
        return [int(token) for token in response.json()["tokens"]]
    except (ValueError, LookupError, TypeError):
        raise BenchError(f"the response of {url} has no token ids; pass --tokenizer") from None
