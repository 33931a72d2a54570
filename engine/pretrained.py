"""Calls transformers' Auto classes so that code that comes with a model is never run.

Without `trust_remote_code=False` transformers prompts in the terminal whether to run the code that `auto_map` names.
"""

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.text import first_line

NO_REMOTE_CODE: dict[str, Any] = {"trust_remote_code": False}
AUTO_MAP = "auto_map"


def custom_code(declared: dict[str, Any], auto_class: str) -> str | None:
    """The code that a JSON file's `auto_map` names for one of transformers' Auto classes; None if there is none."""
    named = declared.get(AUTO_MAP)
    if isinstance(named, dict):
        named = named.get(auto_class)
    elif auto_class != "AutoTokenizer":  # only tokenizer_config.json may have a list there
        return None
    if isinstance(named, list):
        named = next((one for one in reversed(named) if one), None)
    return str(named) if named else None


def load_auto_tokenizer(name: str) -> Any:
    """Load the tokenizer of a folder or a hub id as transformers' class.

    Raises ModelError if it can't be read or needs custom code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **NO_REMOTE_CODE)
    except Exception as error:  # a broken file can cause any error
        refuse_custom_tokenizer(Path(name))
        cause = first_line(error)
        if NO_REMOTE_CODE_MARK in str(error):  # a hub id: there is no folder to look into
            cause = f"it needs custom code ({AUTO_MAP}), which is never run"
        raise ModelError(f"no tokenizer can be read from {name}: {cause} (use another one with --tokenizer)") from error


NO_REMOTE_CODE_MARK = "custom code"  # part of transformers' message without trust_remote_code


def refuse_custom_tokenizer(folder: Path) -> None:
    """Raise ModelError if the tokenizer of a folder needs custom code."""
    for file in ("tokenizer_config.json", "config.json"):
        try:
            declared = json.loads((folder / file).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            continue
        code = custom_code(declared, "AutoTokenizer") if isinstance(declared, dict) else None
        if code is not None:
            raise ModelError(
                f"the tokenizer of {folder} needs custom code ({AUTO_MAP} in {file} names {code}), which is never "
                f"run: use a folder with a tokenizer.json (--tokenizer)"
            )


# Tensors of checkpoints that an encoder for embeddings has no use for: its heads, and what it computes itself.
NEEDLESS = [
    r"(^|\.)pooler\.",
    r"^(cls|lm_head|head|decoder|(\w+_)?predictions|vocab_\w+)\.",
    r"position_ids$",
]


def build_encoder(config: Any, *, classifies: bool, **options: Any) -> Any:
    """Build transformers' class of an encoder: with its classification head, or without any head and pooler.

    `options` are those of `from_config`.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification

    if classifies:
        return AutoModelForSequenceClassification.from_config(config, **options, **NO_REMOTE_CODE)
    model = AutoModel.from_config(config, **options, **NO_REMOTE_CODE)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    model._keys_to_ignore_on_load_unexpected = [*(model._keys_to_ignore_on_load_unexpected or ()), *NEEDLESS]
    return model


def build_causal_lm(config: Any, **options: Any) -> Any:
    """Build transformers' class for a model config; `options` are those of `from_config`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, **options, **NO_REMOTE_CODE)
