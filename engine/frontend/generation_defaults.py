"""Sampling defaults of a model: its generation_config.json, and the flags that change them."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError, ModelError, RequestError
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.tokenizer import Tokenizer, known_ids, read_json

FILE = "generation_config.json"
# Its fields, and their names in SamplingParams. As in vLLM, do_sample is not used: temperature 0 is greedy.
FLOATS = {name: name for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
INTEGERS = {"top_k": "top_k", "max_new_tokens": "max_tokens"}
FROM_MODEL, WITHOUT = "auto", ("none", "vllm")  # values of --generation-config; any other is a folder


class GenerationDefaults(msgspec.Struct, frozen=True):
    """Defaults for fields of SamplingParams that a request leaves out, and further end-of-sequence ids."""

    sampling: dict[str, int | float] = {}
    eos_ids: tuple[int, ...] = ()

    def add_eos_ids(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Add these end-of-sequence ids to those of the tokenizer."""
        tokenizer.eos_ids = tuple(dict.fromkeys((*tokenizer.eos_ids, *known_ids(self.eos_ids, vocab_size))))

    def params(self, **given: Any) -> SamplingParams:
        """SamplingParams of the defaults, overridden by what is given."""
        return SamplingParams(**{**self.sampling, **given})


def read_generation(source: str, model: Path, override: dict[str, Any] | None = None) -> GenerationDefaults:
    """Read the defaults of a model.

    Args:
        source: --generation-config. auto: the model's own file; none or vllm: no sampling defaults, only the
            end-of-sequence ids; else a folder with such a file, or the file.
        model: the model's folder, or its config.json.
        override: fields that replace those of the file.

    Raises:
        ConfigError, ModelError: there is no such file, or a value is out of range; the message names the field.
    """
    own = (model if model.is_dir() else model.parent) / FILE
    file = own
    if source not in (FROM_MODEL, *WITHOUT):
        file = Path(source).expanduser()
        file = file / FILE if file.is_dir() else file
        if not file.is_file():
            raise ConfigError(
                f"--generation-config {source}: {file} doesn't exist; auto uses the model's own file, none no defaults"
            )
    found = read_json(file)
    eos = found.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    fields = {} if source in WITHOUT else found
    try:
        sampling = _sampling(fields)
        eos_ids = tuple(_integer("eos_token_id", token) for token in ids)
    except RequestError as error:
        raise ModelError(f"{file}: {error} (--generation-config none ignores its sampling defaults)") from error
    try:
        sampling |= _sampling(override or {})
        unknown = [name for name in override or {} if name not in (*FLOATS, *INTEGERS)]
        if unknown:
            raise RequestError(f"{unknown[0]} is not one of {', '.join((*FLOATS, *INTEGERS))}", unknown[0])
    except RequestError as error:
        raise ConfigError(f"--override-generation-config: {error}") from error
    return GenerationDefaults(sampling, eos_ids)


def _sampling(fields: dict[str, Any]) -> dict[str, int | float]:
    """The fields that are sampling defaults, by their names in SamplingParams. Raises RequestError."""
    found: dict[str, int | float] = {}
    for names, take in ((FLOATS, _number), (INTEGERS, _integer)):
        found |= {own: take(name, fields[name]) for name, own in names.items() if fields.get(name) is not None}
    SamplingParams(**found)  # type: ignore[arg-type]  # checks the ranges
    return found


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number, not {json.dumps(value)}", name)
    return float(value)


def _integer(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise RequestError(f"{name} must be an integer, not {json.dumps(value)}", name)
    return int(number)
