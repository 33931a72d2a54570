"""Names of the files that describe a model, and the choice between the two formats."""

from pathlib import Path

CONFIG = "config.json"
PARAMS = "params.json"  # of Mistral's own format


def is_mistral_format(path: Path, tokenizer_mode: str) -> bool:
    """Whether a folder is read in Mistral's own format: with `--tokenizer-mode mistral`, or without a config.json."""
    if not (path / PARAMS).is_file():
        return False
    return tokenizer_mode == "mistral" or not (path / CONFIG).is_file()
