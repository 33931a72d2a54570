"""The ids of tokens that a processor writes, from the files of a model's tokenizer."""

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError

WHOLE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def special_token_id(folder: Path, token: str, fallback: int | None = None) -> int:
    """The id of a token.

    Raises ModelError if the folder's tokenizer has no such token, or if there is neither a tokenizer nor a fallback.

    Args:
        folder: the model's folder.
        token: its text.
        fallback: its id in a folder without a tokenizer (a model of dummy weights has only a config).
    """
    whole = _read(folder / WHOLE)
    ids = {entry["content"]: int(entry["id"]) for entry in whole.get("added_tokens", ())}
    vocabulary = whole.get("model", {}).get("vocab")
    if token not in ids and isinstance(vocabulary, dict):
        ids |= {token: int(vocabulary[token])} if token in vocabulary else {}
    if token not in ids:
        added: dict[str, Any] = _read(folder / CONFIG).get("added_tokens_decoder", {})
        ids |= {entry["content"]: int(number) for number, entry in added.items()}
    if token in ids:
        return ids[token]
    if ids or fallback is None:
        raise ModelError(f"{folder}: the tokenizer has no token {token}, which stands for a part of an image or sound")
    return fallback


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from error
    return found
