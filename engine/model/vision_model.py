"""Puts a LLaVA checkpoint together from a text model and a vision tower with its connector that ship with Redline."""

import json
import shutil
from pathlib import Path
from typing import Any

from engine.errors import ModelError

VISION, TEXT, INDEX = "vision.safetensors", "text.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
PLACEHOLDER = "<image>"
_LENGTH = 8  # bytes at the beginning of a safetensors file: the size of its header


def assemble(text_model: Path, shipped: Path, to: Path) -> None:
    """Write the whole checkpoint into an existing folder.

    Raises ModelError if the two parts do not fit.

    Args:
        text_model: folder with one `model.safetensors`, a `tokenizer.json` and their configs.
        shipped: folder with `vision.safetensors`, LLaVA's `config.json` and all other files that the two models do not
            share.
    """
    config = json.loads((shipped / "config.json").read_text())
    for file in [*text_model.glob("*.json"), *shipped.iterdir()]:  # the latter replace those of the text model
        if file.suffix != ".md":
            shutil.copyfile(file, to / file.name)
    tokenizer = json.loads((text_model / TOKENIZER).read_text())
    rename_token(tokenizer, config["image_token_index"], PLACEHOLDER)
    (to / TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False))
    with_prefix(text_model / "model.safetensors", "language_model.", to / TEXT)
    places = {name: file for file in (TEXT, VISION) for name in _header(to / file) if name != "__metadata__"}
    size = sum((to / file).stat().st_size for file in (TEXT, VISION))
    (to / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2))


def rename_token(tokenizer: dict[str, Any], token_id: int, name: str) -> None:
    """Give a special token of a tokenizer.json another text. Raises ModelError if no special token has this id."""
    token = next((token for token in tokenizer["added_tokens"] if token["id"] == token_id and token["special"]), None)
    vocabulary = tokenizer["model"]["vocab"]
    if token is None or vocabulary.get(token["content"]) != token_id:
        raise ModelError(f"token {token_id} of the text model isn't a special one that can stand for {name}")
    del vocabulary[token["content"]]
    vocabulary[name] = token_id
    token["content"] = name


def with_prefix(source: Path, prefix: str, target: Path) -> None:
    """Copy a safetensors file and put `prefix` before the names of its tensors."""
    header = {name if name == "__metadata__" else prefix + name: entry for name, entry in _header(source).items()}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _LENGTH)  # tensors begin at a multiple of 8 bytes
    with source.open("rb") as old, target.open("wb") as new:
        old.seek(_LENGTH + int.from_bytes(old.read(_LENGTH), "little"))
        new.write(len(encoded).to_bytes(_LENGTH, "little") + encoded)
        shutil.copyfileobj(old, new, 16 << 20)


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(_LENGTH), "little")))
    return header
