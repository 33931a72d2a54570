"""Configs of Llama-like decoders without transformers, whose import takes a second.

Only files that hold nothing unusual are read here: fields of the expected types, and none that is not known. All others
are left to transformers' class, with its conversions and its errors (`engine.model.config.config_json`).
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

# Types of values, each exactly (true is not an integer). A field may have one of several.
_INT, _FLOAT, _BOOL, _STR = (int,), (float,), (bool,), (str,)
_NUMBER, _ID = (int, float), (int, type(None))
REQUIRED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "max_position_embeddings",
        ),
        _INT,
    ),
    "rms_norm_eps": _FLOAT,
    "architectures": (list,),
}  # fmt: skip
OPTIONAL: dict[str, tuple[type, ...]] = {
    "model_type": _STR,
    "hidden_act": _STR,
    "head_dim": _INT,
    **dict.fromkeys(("dtype", "torch_dtype"), _STR),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache", "rope_interleaved"), _BOOL),
    "is_llama_config": _BOOL,
    "transformers.js_config": (dict,),
    "initializer_range": _FLOAT,
    **dict.fromkeys(("attention_dropout", "rope_theta"), _NUMBER),
    "pretraining_tp": _INT,
    **dict.fromkeys(("rope_parameters", "rope_scaling"), (dict, type(None))),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "unk_token_id"), _ID),
    "eos_token_id": (*_ID, list),
    **dict.fromkeys(("transformers_version", "_name_or_path", "_model_name_or_path"), _STR),
}
# What a decoder may have besides, by its type.
_WINDOWS = {"use_sliding_window": _BOOL, "sliding_window": _ID, "max_window_layers": _INT, "layer_types": (list,)}
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "llama": {},
    "mistral": {"sliding_window": _ID},
    "qwen2": _WINDOWS,
    "qwen3": _WINDOWS,
}
# What a type must have, because its class has a default of its own.
NEEDED = {"mistral": {"sliding_window"}, "qwen3": {"head_dim"}}
# The parameters of rotary embeddings besides theta, by their type.
ORIGINAL = "original_max_position_embeddings"
ROPES: dict[str, dict[str, tuple[type, ...]]] = {
    "default": {"rope_type": _STR},
    "llama3": {
        "rope_type": _STR, ORIGINAL: _INT, **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), _NUMBER)
    },
}  # fmt: skip
FULL = "full_attention"
MOST_LAYERS = 1000
CAUSAL = "ForCausalLM"
DTYPES = {"float32", "bfloat16", "float16"}
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "dtype": None,
    "quantization_config": None,
}  # fmt: skip


class PlainConfig(SimpleNamespace):
    """The fields of a config that Redline reads, as transformers' class has them."""

    def get_text_config(self, decoder: bool = True) -> "PlainConfig":  # noqa: ARG002
        return self


def plain_config(fields: Mapping[str, Any]) -> PlainConfig | None:
    """The config of the fields of a file; None if only transformers' class can tell what they mean."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS or not _are_usual(fields, REQUIRED | OPTIONAL | KINDS[kind]):
        return None
    rope = _rope(fields)
    if rope is None or not _are_possible(fields):
        return None
    known = {name: value for name, value in fields.items() if name not in ("torch_dtype", "rope_theta", "rope_scaling")}
    heads = fields["num_attention_heads"]
    found = PlainConfig(**{**DEFAULTS, "head_dim": fields["hidden_size"] // heads, **known, "rope_parameters": rope})
    found.dtype = fields.get("dtype", fields.get("torch_dtype"))
    if ORIGINAL in rope:
        found.original_max_position_embeddings = rope[ORIGINAL]
    if "use_sliding_window" in KINDS[kind]:  # it isn't used
        found.sliding_window, found.layer_types = None, _full_layers(fields)
    return found


def _are_usual(fields: Mapping[str, Any], known: Mapping[str, tuple[type, ...]]) -> bool:
    """Whether all fields are known and of their types, and none that is required is missing."""
    return REQUIRED.keys() <= fields.keys() and all(
        name in known and type(value) in known[name] for name, value in fields.items()
    )


def _are_possible(fields: Mapping[str, Any]) -> bool:
    """Whether the values are such that no check of transformers or Redline refuses them."""
    sizes = [fields[name] for name, types in REQUIRED.items() if types == _INT]
    sizes.append(fields.get("head_dim", 1))
    eos = fields.get("eos_token_id")
    dtypes = {fields[name] for name in ("dtype", "torch_dtype") if name in fields}
    return (
        min(sizes) >= 1
        and fields["num_hidden_layers"] <= MOST_LAYERS
        and fields["hidden_size"] % fields["num_attention_heads"] == 0
        and fields["num_attention_heads"] % fields["num_key_value_heads"] == 0
        and fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"]) % 2 == 0
        and 0 < fields["rms_norm_eps"] < 1
        and 0 <= fields.get("initializer_range", 0.0) <= 1
        and 0 <= fields.get("attention_dropout", 0.0) <= 1
        and fields.get("hidden_act", "silu") == "silu"
        and not fields.get("use_sliding_window")
        and (fields.get("sliding_window") or 1) >= 1
        and fields.get("layer_types", _full_layers(fields)) == _full_layers(fields)
        and NEEDED.get(fields["model_type"], set()) <= fields.keys()
        and (not isinstance(eos, list) or all(type(one) is int for one in eos))
        and bool(fields["architectures"])
        and all(isinstance(one, str) and one.endswith(CAUSAL) for one in fields["architectures"])
        and len(dtypes) <= 1
        and dtypes <= DTYPES
    )


def _full_layers(fields: Mapping[str, Any]) -> list[str]:
    return [FULL] * fields["num_hidden_layers"]


def _rope(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters of rotary embeddings; None if they may be others than those of ROPES.

    Files have them next to theta as `rope_scaling`, or together with it as `rope_parameters`.
    """
    given = fields.get("rope_parameters"), fields.get("rope_scaling")
    if all(given):
        return None
    scaled = next(filter(None, given), {"rope_type": "default"})
    theta = scaled.get("rope_theta", fields.get("rope_theta"))
    rope = {name: value for name, value in scaled.items() if name != "rope_theta"}
    kind = rope.get("rope_type")
    known = ROPES.get(kind, {}) if isinstance(kind, str) else {}
    if rope.keys() != known.keys() or any(type(value) not in known[name] for name, value in rope.items()):
        return None
    numbers: list[Any] = [theta, *(value for name, value in rope.items() if name != "rope_type")]
    if type(theta) not in _NUMBER or not all(0 < number < math.inf for number in numbers):
        return None
    if ("rope_theta" in scaled and "rope_theta" in fields) or not _is_scaled_up(rope, fields):
        return None
    return {**rope, "rope_theta": theta}


def _is_scaled_up(rope: Mapping[str, Any], fields: Mapping[str, Any]) -> bool:
    """Whether parameters of llama3, if they are that, are such that transformers has no warning about them."""
    return ORIGINAL not in rope or (
        rope["factor"] >= 1
        and rope["low_freq_factor"] < rope["high_freq_factor"]
        and rope[ORIGINAL] < fields["max_position_embeddings"]
    )
