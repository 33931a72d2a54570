"""Sampling defaults that come with a model: its generation_config.json, and what a server's flags make of it."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError, ModelError, RequestError
from engine.frontend.sampling import SamplingParams
from engine.frontend.tokenizer import Tokenizer, known_ids, read_json

FILE = "generation_config.json"
# Its fields, and what SamplingParams calls them. As in vLLM, do_sample plays no part: a temperature of 0 is greedy.
FLOATS = {name: name for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
INTEGERS = {"top_k": "top_k", "max_new_tokens": "max_tokens"}
FROM_MODEL, WITHOUT = "auto", ("none", "vllm")  # of --generation-config; else it is a folder


class GenerationDefaults(msgspec.Struct, frozen=True):
    """What requests get that say nothing of it, as fields of SamplingParams, and ids that end a text."""

    sampling: dict[str, int | float] = {}
    eos_ids: tuple[int, ...] = ()

    def add_eos_ids(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """Have these ids end texts too."""
        tokenizer.eos_ids = tuple(dict.fromkeys((*tokenizer.eos_ids, *known_ids(self.eos_ids, vocab_size))))

    def params(self, **given: Any) -> SamplingParams:
        """SamplingParams with the defaults under what is given."""
        return SamplingParams(**{**self.sampling, **given})


def read_generation(source: str, model: Path, override: dict[str, Any] | None = None) -> GenerationDefaults:
    """Read the defaults of a model.

    Args:
        source: --generation-config. auto: the model's own file; none or vllm: no sampling defaults, but the ids that
            end a text; else a folder with such a file, or the file.
        model: the model's folder, or the file that stands for it.
        override: fields that win over the file's.

    Raises:
        ConfigError, ModelError: there is no such file, or a value can't hold; the message names the field.
    """
    own = (model if model.is_dir() else model.parent) / FILE
    file = own
    if source not in (FROM_MODEL, *WITHOUT):
        file = Path(source).expanduser()
        file = file / FILE if file.is_dir() else file
        if not file.is_file():
            raise ConfigError(
                f"--generation-config {source}: {file} doesn't exist; auto is the model's own, none is none"
            )
    found = read_json(file)
    eos = found.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    fields = {} if source in WITHOUT else found
    try:
        sampling = _sampling(fields)
        eos_ids = tuple(_whole("eos_token_id", token) for token in ids)
    except RequestError as error:
        raise ModelError(f"{file}: {error} (--generation-config none does without its sampling defaults)") from error
    try:
        sampling |= _sampling(override or {})
        unknown = [name for name in override or {} if name not in (*FLOATS, *INTEGERS)]
        if unknown:
            raise RequestError(f"{unknown[0]} is none of {', '.join((*FLOATS, *INTEGERS))}", unknown[0])
    except RequestError as error:
        raise ConfigError(f"--override-generation-config: {error}") from error
    return GenerationDefaults(sampling, eos_ids)


def _sampling(fields: dict[str, Any]) -> dict[str, int | float]:
    """The fields that are sampling defaults, by their names in SamplingParams; RequestError if one can't hold."""
    found: dict[str, int | float] = {}
    for names, take in ((FLOATS, _number), (INTEGERS, _whole)):
        found |= {own: take(name, fields[name]) for name, own in names.items() if fields.get(name) is not None}
    SamplingParams(**found)  # type: ignore[arg-type]  # refuses what is out of range
    return found


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} must be a number, not {json.dumps(value)}", name)
    return float(value)


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise RequestError(f"{name} must be a whole number, not {json.dumps(value)}", name)
    return int(number)
