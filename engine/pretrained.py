"""The one place for transformers' Auto classes: code that lies beside a model is never run, and nobody is asked.

Without `trust_remote_code=False` transformers asks in the terminal whether to run what `auto_map` names.
"""

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError

NO_REMOTE_CODE: dict[str, Any] = {"trust_remote_code": False}
AUTO_MAP = "auto_map"


def custom_code(declared: dict[str, Any], auto_class: str) -> str | None:
    """What the `auto_map` of a JSON file names for one of transformers' Auto classes; None if it names nothing."""
    named = declared.get(AUTO_MAP)
    if isinstance(named, dict):
        named = named.get(auto_class)
    elif auto_class != "AutoTokenizer":  # only tokenizer_config.json has had a plain list there
        return None
    if isinstance(named, list):
        named = next((one for one in reversed(named) if one), None)
    return str(named) if named else None


def load_auto_tokenizer(name: str, *, flag: str = "--tokenizer") -> Any:
    """The tokenizer of a folder or a hub id as transformers' own class.

    Raises ModelError, naming `flag`, if it can't be read or needs code of its own.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **NO_REMOTE_CODE)
    except Exception as error:  # whatever a broken file makes it raise
        refuse_custom_tokenizer(Path(name), flag=flag)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if NO_REMOTE_CODE_MARK in str(error):  # of the hub, where no file lies here to look into
            first = f"it needs code of its own ({AUTO_MAP}), which is never run"
        raise ModelError(f"no tokenizer can be read from {name}: {first} ({flag} names another)") from error


NO_REMOTE_CODE_MARK = "custom code"  # in what transformers says when it would have to run some


def refuse_custom_tokenizer(folder: Path, *, flag: str = "--tokenizer") -> None:
    """Raise ModelError if the tokenizer of a folder is code that lies beside it."""
    for file in ("tokenizer_config.json", "config.json"):
        try:
            declared = json.loads((folder / file).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError):
            continue
        code = custom_code(declared, "AutoTokenizer") if isinstance(declared, dict) else None
        if code is not None:
            raise ModelError(
                f"the tokenizer of {folder} is code of its own ({AUTO_MAP} in {file} names {code}), which is never "
                f"run: {flag} names another folder, one with a tokenizer.json"
            )


def build_causal_lm(config: Any, **options: Any) -> Any:
    """An instance of transformers' class for a model config; `options` as of its `from_config`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, **options, **NO_REMOTE_CODE)
