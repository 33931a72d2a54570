"""Reads a model's config.json, with each field in the type that transformers' class declares for it.

Published files have integers where floats are meant and the reverse (30 for 30.0): those are converted. A field of
another type, or a size that no model can have, is a ModelError that names the field.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.model.config.file_names import CONFIG
from engine.model.config.plain_config import plain_config
from engine.pretrained import AUTO_MAP, custom_code
from engine.text import first_line

LONGROPE = "longrope"
TEXT = "text_config"  # the decoder of a model that also takes images or audio
ORIGINAL = "original_max_position_embeddings"  # the length before rope scaling
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
# Fields that Redline reads although some classes don't declare them.
ALSO_DECLARED: dict[str, Any] = {
    **dict.fromkeys(("architectures", "layer_types"), list[str] | None),
    **dict.fromkeys(("quantization_config", "rope_parameters", "rope_scaling", "id2label"), dict | None),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "rotary_pct"), float | int | None),
    **dict.fromkeys(("sliding_window", ORIGINAL, "max_position_embeddings", "head_dim"), int | None),
    "num_key_value_heads": int | None,
    "tie_word_embeddings": bool | None,
    **dict.fromkeys(("dtype", "torch_dtype"), str | None),
}
ROPE_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("type", "rope_type"), str | None),
    **dict.fromkeys(
        (
            "factor", "rope_theta", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow",
            "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
        ),
        float | int | None,
    ),
    ORIGINAL: int | None,
    **dict.fromkeys(("short_factor", "long_factor"), list[float | int] | None),
}  # fmt: skip
ROPE_POSITIVE = ("factor", "rope_theta", ORIGINAL)
ROPE_REQUIRED = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    LONGROPE: ("short_factor", "long_factor"),
}
QUANTIZATION_FIELDS: dict[str, Any] = {
    "quant_method": str | None,
    "bits": int | None,
    "num_bits": int | None,
    "group_size": int | None,
    "weight_block_size": list[int] | None,
    "block_structure": list[int] | str | None,
    "config_groups": dict | None,
    "weights": dict | None,
}
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
DTYPE_FIELDS = ("dtype", "torch_dtype")
# Implementations that transformers would fetch from the hub; Redline's attention replaces them.
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")

_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list",
               dict: "an object", type(None): "null"}  # fmt: skip


def read_config_json(path: Path, name: str, overrides: Mapping[str, Any] | None = None, *, plain: bool = False) -> Any:
    """Read the transformers config of a model.

    Raises ModelError if it can't be read, or if the model needs custom code.

    Args:
        path: the model's folder, or a config file alone.
        name: the model as the user named it, for errors.
        overrides: fields that the user changes; an object replaces the whole object of the file.
        plain: whether a `PlainConfig` will do, with which no class can be built.
    """
    file = path / CONFIG if path.is_dir() else path
    fields = _overridden(_read_object(file, name), overrides or {})
    if plain and (found := plain_config(fields)) is not None:
        return found
    try:
        return _make_config(fields, str(path))
    except _CustomCodeError as error:
        raise ModelError(f"{name} can't be run: {error}") from None
    except Exception as error:  # the config class has its own checks
        raise ModelError(f"{name}: {file.name} can't be used: {message_of(error)}") from error


def _overridden(fields: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the overrides. Rope scaling has two names: an override of either one drops both from the file's fields."""
    names = {"rope_scaling", "rope_parameters"}
    dropped = names if names & overrides.keys() else set()
    return {key: value for key, value in fields.items() if key not in dropped} | dict(overrides)


class FieldError(Exception):
    """A wrong field of a config file; the message names it."""


class _CustomCodeError(Exception):
    """The model needs custom code; the message is the end of a sentence about the model."""


def _read_object(file: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: {file.name} can't be read: {message_of(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{name}: {file.name} can't be read: it is {_written(found)}, not an object")
    return found


def _make_config(fields: dict[str, Any], path: str) -> Any:
    from transformers import CONFIG_MAPPING

    from engine.model.molmo import configuration

    configuration.register()
    model_type = fields.get("model_type")
    code = custom_code(fields, "AutoConfig") or custom_code(fields, "AutoModelForCausalLM")
    if code is not None and model_type not in CONFIG_MAPPING:
        raise _CustomCodeError(
            f"it needs custom code ({AUTO_MAP} in {CONFIG} names {code}), which is never run, and transformers has no "
            f"class for models of type {model_type!r}"
        )
    if not isinstance(model_type, str):
        raise FieldError("model_type is missing" if model_type is None else _mismatch("model_type", model_type, (str,)))
    if model_type not in CONFIG_MAPPING:
        raise FieldError(f"transformers has no model_type {model_type!r}")
    if model_type == "mistral" and fields.get("layer_types") is not None:
        model_type = "ministral"  # as in transformers: the class with windows in some layers
    declaring = CONFIG_MAPPING[model_type]
    fields = {key: value for key, value in fields.items() if key not in IMPLEMENTATIONS}
    fields = _checked(fields, declaring)
    text = fields.get(TEXT)
    if isinstance(text, dict) and text.get("model_type") in CONFIG_MAPPING:
        fields[TEXT] = _checked(text, CONFIG_MAPPING[text["model_type"]], f"{TEXT}.")
    return declaring.from_dict(fields, name_or_path=path)


def _checked(fields: Mapping[str, Any], declaring: Any, prefix: str = "") -> dict[str, Any]:
    """The fields of a class with the types that it declares. Raises FieldError, with the prefix before the name."""
    try:
        found = _with_original_length(_with_types(fields, declaring))
        _check_sizes(found, declaring.attribute_map)
        _check_dtype(found)
        _check_activation(found)
    except FieldError as error:
        raise FieldError(f"{prefix}{error}") from None
    return found


def _with_types(fields: Mapping[str, Any], declaring: type) -> dict[str, Any]:
    """Convert the fields of a file to the types that the class declares; undeclared fields stay as they are."""
    # Some classes name torch in their annotations without importing it; in a file a dtype is a string.
    hints = typing.get_type_hints(declaring, localns={"torch": types.SimpleNamespace(dtype=str)})
    names = {one.name for one in dataclasses.fields(declaring)}
    declared = ALSO_DECLARED | {name: hint for name, hint in hints.items() if name in names}
    found = {key: as_declared(key, value, declared[key]) if key in declared else value for key, value in fields.items()}
    for key in ("rope_scaling", "rope_parameters"):
        if found.get(key):
            found[key] = _rope_types(key, found[key])
    if found.get("quantization_config"):
        found["quantization_config"] = _nested_types("quantization_config", found["quantization_config"])
    return found


def _nested_types(key: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the fields of a `quantization_config`, nested objects included."""
    found: dict[str, Any] = {}
    for inner, value in config.items():
        where, hint = f"{key}.{inner}", QUANTIZATION_FIELDS.get(inner)
        found[inner] = value if hint is None else as_declared(where, value, hint)
        if isinstance(value, dict):
            found[inner] = _nested_types(where, value)
    return found


def _rope_types(key: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """Convert and check rope parameters; they may be nested once, by layer type."""
    found: dict[str, Any] = {}
    for inner, value in rope.items():
        where = f"{key}.{inner}"
        if isinstance(value, dict):
            found[inner] = _rope_types(where, value)
            continue
        found[inner] = as_declared(where, value, ROPE_FIELDS[inner]) if inner in ROPE_FIELDS else value
        if inner in ROPE_POSITIVE and found[inner] is not None and found[inner] <= 0:
            raise FieldError(f"{where} must be greater than 0, not {_written(value)}")
    rope_type = LONGROPE if _is_longrope(found) else found.get("rope_type") or found.get("type")
    for required in ROPE_REQUIRED.get(str(rope_type), ()):
        if required not in found:
            raise FieldError(f"{key}.{required} is missing, which rotary embeddings of type {rope_type} need")
    return found


def _is_longrope(rope: Mapping[str, Any]) -> bool:
    """Whether the rope type is longrope; the first files of Phi-3 name it su or yarn."""
    rope_type = rope.get("rope_type") or rope.get("type")
    return rope_type in (LONGROPE, "su") or (rope_type == "yarn" and "long_factor" in rope)


def _with_original_length(fields: dict[str, Any]) -> dict[str, Any]:
    """Rename longrope to its present name, and put the original length both next to the scaling and within it.

    Files have it in either place. A class that declares the field next to the scaling has a default there, which would
    override the value within; a class that does not declare it reads the value within.
    """
    key = next((key for key in ("rope_scaling", "rope_parameters") if fields.get(key)), None)
    if key is None or any(isinstance(value, dict) for value in fields[key].values()):
        return fields
    rope = dict(fields[key])
    if _is_longrope(rope):
        rope.pop("type", None)
        rope["rope_type"] = LONGROPE
    original = fields.get(ORIGINAL) or rope.get(ORIGINAL)
    if original is None or (rope.get("rope_type") or rope.get("type")) not in (LONGROPE, "yarn", "llama3"):
        return fields | {key: rope}
    return fields | {key: rope | {ORIGINAL: original}, ORIGINAL: original}


def as_declared(name: str, value: Any, hint: Any) -> Any:
    """Convert a field's value to the type of an annotation (30 to 30.0 and the reverse).

    Raises FieldError for a value of another type.
    """
    choices = _choices(hint)
    if choices is None:
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise FieldError(f"{name} must be a finite number, not {_written(value)}")
    bare = tuple(typing.get_origin(one) or one for one in choices)
    if isinstance(value, bool):
        fits = bool in bare
    elif isinstance(value, int):
        fits = int in bare or float in bare
        value = float(value) if fits and int not in bare else value
    elif isinstance(value, float):
        fits = float in bare or (int in bare and value.is_integer())
        value = int(value) if fits and float not in bare else value
    elif isinstance(value, list):
        fits = list in bare
        inner = next((typing.get_args(one) for one in choices if typing.get_origin(one) is list), ())
        value = [as_declared(f"{name}[{i}]", one, inner[0]) for i, one in enumerate(value)] if inner else value
    elif isinstance(value, dict):
        fits = dict in bare
    else:
        fits = type(value) in bare
    if not fits:
        raise FieldError(_mismatch(name, value, bare))
    return value


def _choices(hint: Any) -> tuple[Any, ...] | None:
    """The types that an annotation allows; None if one of them is not a JSON type."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        found = [_choices(one) for one in typing.get_args(hint)]
        return None if any(one is None for one in found) else tuple(one for several in found for one in several or ())
    if typing.is_typeddict(hint):
        return (dict,)
    origin = typing.get_origin(hint) or hint
    return (hint,) if origin in _TYPE_NAMES else None


def _check_sizes(fields: Mapping[str, Any], aliases: Mapping[str, str]) -> None:
    """Raise FieldError for a size below 1, or if the query heads are not a multiple of the key-value heads."""
    keys = {name: aliases[name] if aliases.get(name) in fields else name for name in SIZES}
    sizes = {name: fields[key] for name, key in keys.items() if isinstance(fields.get(key), int)}
    for name, size in sizes.items():
        check_size(keys[name], size)
    heads, kv_heads = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        names = keys["num_attention_heads"], keys["num_key_value_heads"]
        raise FieldError(f"{names[0]} ({heads}) must be a multiple of {names[1]} ({kv_heads})")


def check_size(name: str, size: int) -> None:
    """Raise FieldError for a size below 1."""
    if size < 1:
        raise FieldError(f"{name} must be at least 1, not {size}")


def _check_dtype(fields: dict[str, Any]) -> None:
    """Remove the prefix `torch.` of dtypes; "auto" becomes None. Raises FieldError for an unknown dtype."""
    for key in DTYPE_FIELDS:
        value = fields.get(key)
        if value is None:
            continue
        plain = value.removeprefix("torch.")
        fields[key] = None if plain == "auto" else plain
        if fields[key] is not None:
            import torch

            if not isinstance(getattr(torch, plain, None), torch.dtype):
                raise FieldError(f"{key} must be a type such as bfloat16, not {value!r}")


def _check_activation(fields: Mapping[str, Any]) -> None:
    from transformers.activations import ACT2FN

    for key in ACTIVATIONS:
        value = fields.get(key)
        if value is not None and value not in ACT2FN:
            raise FieldError(f"{key} must be an activation function that transformers has, not {value!r}")


def _mismatch(name: str, value: Any, allowed: tuple[Any, ...]) -> str:
    names = list(dict.fromkeys(_TYPE_NAMES[one] for one in allowed if one is not type(None)))
    if "a number" in names and "an integer" in names:
        names.remove("an integer")
    return f"{name} must be {' or '.join(names)}, not {_written(value)}"


def _written(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"the string {text}" if isinstance(value, str) else text if len(text) <= 60 else f"{text[:57]}..."


def message_of(error: BaseException) -> str:
    """The first line of an error's message, without the validator that raised it."""
    inner = error.__cause__ if type(error).__name__.startswith("StrictDataclass") and error.__cause__ else error
    return first_line(inner)
