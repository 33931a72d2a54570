"""Values of options of `redline serve` that need parsing: files, JSON, pairs."""

import json
from pathlib import Path
from typing import Any

import click

from engine.config import MISTRAL
from engine.json_options import read_overrides

TEMPLATE_MARKS = ("{{", "{%", "{#")


def split_adapters(given: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Names and folders of adapters, from NAME=PATH, or from vLLM's JSON objects with name and path."""
    return tuple(_adapter(one) for one in given)


def _adapter(given: str) -> tuple[str, str]:
    name, path = "", ""
    if given.lstrip().startswith("{"):
        try:
            found = json.loads(given)
        except ValueError as error:
            raise click.UsageError(f"--lora: {given!r} is not valid JSON: {error}") from error
        name, path = str(found.get("name") or ""), str(found.get("path") or "")
    else:
        name, _, path = given.partition("=")
    if not name or not path:
        raise click.UsageError(f"--lora takes NAME=PATH, not {given!r}")
    return name, str(Path(path).expanduser())


def read_chat_template(given: str | None) -> str | None:
    """The source of a chat template: the contents of a file, or the value itself."""
    if given is None:
        return None
    if any(mark in given for mark in TEMPLATE_MARKS):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.UsageError(f"--chat-template: {given!r} can't be read: {reason}") from error


def read_overrides_of(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Take --hf-overrides, --rope-scaling and --rope-theta out of `settings`, as fields of config.json to change."""
    found = read_overrides(settings.pop("hf_overrides") or "{}")
    for field in ("rope_scaling", "rope_theta"):
        value = settings.pop(field)
        if value is None:
            continue
        if field in found:
            raise click.UsageError(f"--{field.replace('_', '-')} and --hf-overrides both give {field}: use one of them")
        found[field] = read_overrides(value, "--rope-scaling") if isinstance(value, str) else value
    return found or None


def apply_formats(settings: dict[str, Any]) -> list[str]:
    """Turn --load-format mistral and --config-format mistral in `settings` into --tokenizer-mode mistral.

    All three mean the same format of the model folder. Returns notes for the user.
    """
    given = []
    if settings["load_format"] == MISTRAL:
        settings["load_format"] = "auto"
        given.append("--load-format mistral")
    if settings.pop("config_format") == MISTRAL:
        given.append("--config-format mistral")
    if not given or settings["tokenizer_mode"] == MISTRAL:
        return []
    settings["tokenizer_mode"] = MISTRAL
    return [f"{' '.join(given)}: tokenizer, config and weights are all read in Mistral's own format"]
