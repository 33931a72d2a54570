"""The tokens that a model's tokenizer adds to its vocabulary, from tokenizer.json."""

import json
from collections.abc import Mapping
from pathlib import Path

from engine.errors import ModelError

TOKENIZER = "tokenizer.json"


def added_tokens(folder: Path) -> dict[str, int]:
    """Token ids by text; none if the folder has no such file (a model of dummy weights has only a config)."""
    try:
        declared = json.loads((folder / TOKENIZER).read_text(encoding="utf-8")).get("added_tokens") or ()
        return {one["content"]: int(one["id"]) for one in declared}
    except OSError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / TOKENIZER} can't be read: {error}") from error


def check_tokens(folder: Path, tokens: Mapping[str, int]) -> None:
    """Raise ModelError if the folder's tokenizer has other ids for some tokens than its config."""
    added = added_tokens(folder)
    for name, number in tokens.items():
        if added.get(name, number) != number:
            raise ModelError(f"{folder}: {name} is token {added[name]} in {TOKENIZER}, but {number} by config.json")
