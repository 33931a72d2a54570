"""The files of Mistral's own tokenizers, which front ends and the processors of images read."""

import re
from pathlib import Path

TEKKEN = "tekken.json"
PLAIN = "tokenizer.model"
_VERSIONED = re.compile(rf"{re.escape(PLAIN)}\.v(\d+)(?:m(\d+))?")


def find_mistral_tokenizer(folder: Path) -> Path | None:
    """The newest tokenizer file in a folder that names the version of Mistral's chat format."""
    if (folder / TEKKEN).is_file():
        return folder / TEKKEN
    found = [(match, file) for file in folder.glob(f"{PLAIN}.v*") if (match := _VERSIONED.fullmatch(file.name))]
    newest = max(found, key=lambda one: tuple(int(part or 0) for part in one[0].groups()), default=None)
    return newest[1] if newest else None
