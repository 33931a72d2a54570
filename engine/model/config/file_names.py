"""Names of the files that describe a model, and the choice between the two formats."""

import re
from pathlib import Path

CONFIG = "config.json"
PARAMS = "params.json"  # of Mistral's own format
TEKKEN = "tekken.json"
PLAIN = "tokenizer.model"
_VERSIONED = re.compile(rf"{re.escape(PLAIN)}\.v(\d+)(?:m(\d+))?")


def is_mistral_format(path: Path, tokenizer_mode: str) -> bool:
    """Whether a folder is read in Mistral's own format: with `--tokenizer-mode mistral`, or without a config.json."""
    if not (path / PARAMS).is_file():
        return False
    return tokenizer_mode == "mistral" or not (path / CONFIG).is_file()


def find_mistral_tokenizer(folder: Path) -> Path | None:
    """The newest tokenizer file in a folder that names the version of Mistral's chat format."""
    if (folder / TEKKEN).is_file():
        return folder / TEKKEN
    found = [(match, file) for file in folder.glob(f"{PLAIN}.v*") if (match := _VERSIONED.fullmatch(file.name))]
    newest = max(found, key=lambda one: tuple(int(part or 0) for part in one[0].groups()), default=None)
    return newest[1] if newest else None
