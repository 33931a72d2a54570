"""Texts to token ids: with a tokenizer at hand, or by asking the server."""

from pathlib import Path
from typing import Any

import httpx

from bench.control import ControlClient
from bench.errors import BenchError
from bench.loadgen.target import Target
from bench.workloads.base import Encode
from engine.errors import ModelError
from engine.pretrained import load_auto_tokenizer

_TIMEOUT_S = 60.0


def local_tokenizer(name: str) -> Any:
    """The tokenizer in a folder, a tokenizer.json, or a hub id; has encode(text, add_special_tokens=…) and a length."""
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BenchError(f"{path} can't be read as a tokenizer: {error} (--tokenizer)") from None
    try:
        return load_auto_tokenizer(name)
    except ModelError as error:
        raise BenchError(str(error)) from None


def tokenizer_size(tokenizer: Any) -> int:
    return int(tokenizer.get_vocab_size() if hasattr(tokenizer, "get_vocab_size") else len(tokenizer))


def local_encoder(tokenizer: Any) -> Encode:
    """Encode with what local_tokenizer() returned."""

    def encode(texts: list[str]) -> list[list[int]]:
        found = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [list(getattr(ids, "ids", ids)) for ids in found]

    return encode


def server_encoder(target: Target) -> Encode:
    """Encode with the server's POST /tokenize (Redline and vLLM have it); nothing is asked before it is used."""
    url, model = target.base_url + "/tokenize", target.model

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            with ControlClient(target, timeout_s=_TIMEOUT_S) as client:
                return [_ids(client, url, {"model": model, "prompt": t, "add_special_tokens": False}) for t in texts]
        except httpx.HTTPError as error:
            raise BenchError(f"{url} can't be asked: {error or type(error).__name__}: give --tokenizer") from None

    return encode


def _ids(client: ControlClient, url: str, asked: dict[str, Any]) -> list[int]:
    answer = client.post("/tokenize", asked)
    if answer.status_code != 200:
        raise BenchError(f"{url} answers HTTP {answer.status_code}, so it can't tokenize: give --tokenizer")
    try:
        return [int(token) for token in answer.json()["tokens"]]
    except (ValueError, LookupError, TypeError):
        raise BenchError(f"{url} answers without token ids: give --tokenizer") from None
