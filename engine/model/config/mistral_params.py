"""Translates params.json, the config of Mistral's own format, to a transformers config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.model.config.config_json import ORIGINAL, as_declared, check_size, message_of
from engine.model.config.file_names import PARAMS
from engine.model.config.mistral_vision import CLASSES, UnsupportedError, with_vision

POSITIONS = 128_000  # length of the rotary embedding in Mistral's own code
THETA, WINDOWED_THETA = 1e6, 1e4  # its defaults, without and with a sliding window

FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
OPTIONS = {"tied_embeddings": "tie_word_embeddings", "activation": "hidden_act", "dtype": "dtype"}
WITHOUT_EFFECT = ("max_batch_size",)
VISION, AUDIO = "vision_encoder", "multimodal"
WHOLE = ("tie_word_embeddings", "dtype", "quantization_config")  # of the whole model's config, not the decoder's
YARN = {"factor": "factor", "beta": "beta_fast", "alpha": "beta_slow"}


def read_mistral_params(folder: Path, name: str) -> Any:
    """The transformers config that a folder's params.json stands for.

    `name` is the model as the user named it, for errors. Raises ModelError if the file can't be read, has a field that
    is wrong, or describes a model that isn't supported.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        params = json.loads((folder / PARAMS).read_text(encoding="utf-8-sig"))
        if not isinstance(params, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: {PARAMS} can't be read: {error}") from error
    try:
        model_type, fields = _translate(params)
        architectures = [CLASSES.get(model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
        return AutoConfig.for_model(model_type, architectures=architectures, **fields)
    except UnsupportedError as error:
        raise ModelError(f"{name} can't be run: {error} ({PARAMS})") from error
    except Exception as error:  # the config class has its own checks
        raise ModelError(f"{name}: {PARAMS} can't be read: {message_of(error)}") from error


def _translate(params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model type of transformers, and the fields of its config.

    Each helper removes the parameters that it understands; what is left at the end isn't supported.
    """
    left = {key: value for key, value in params.items() if not _is_off(value)}
    _check_kind(left)
    vision = left.pop(VISION, None)
    fields = _sizes_and_options(left)
    window = left.pop("sliding_window", None) or left.pop("_sliding_window", None)
    theta = left.pop("rope_theta", WINDOWED_THETA if isinstance(window, int) else THETA)
    theta = as_declared("rope_theta", theta, float)
    model_type = _attention(fields, window)
    model_type = _rope(fields, model_type, theta, left.pop("yarn", None), left.pop("llama_4_scaling", None))
    if "moe" in left:
        model_type = _moe(fields, model_type, left.pop("moe"))
    for key in ("quantization", "quantization_config"):
        if key in left:
            fields["quantization_config"] = _quantization(left.pop(key))
    unknown = sorted(left.keys() - set(WITHOUT_EFFECT))
    if unknown:
        raise UnsupportedError(f"it has {', '.join(unknown)}, which isn't supported")
    if vision is None:
        return model_type, fields
    whole = {"tie_word_embeddings": False} | {key: fields.pop(key) for key in WHOLE if key in fields}
    return with_vision({"model_type": model_type, **fields}, whole, vision)


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _check_kind(left: dict[str, Any]) -> None:
    if AUDIO in left:
        raise UnsupportedError(f"it takes audio ({AUDIO}), which isn't supported in Mistral's own format")
    kind = left.pop("model_type", "transformer")
    if kind != "transformer":
        raise UnsupportedError(f"its model_type is {kind!r}; only 'transformer' is supported")


def _sizes_and_options(left: dict[str, Any]) -> dict[str, Any]:
    missing = [key for key in FIELDS if key not in left]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    fields = {ours: _typed(theirs, left.pop(theirs)) for theirs, ours in FIELDS.items()}
    fields |= {ours: left.pop(theirs) for theirs, ours in OPTIONS.items() if theirs in left}
    lengths = [_typed(key, left.pop(key)) for key in ("max_seq_len", "max_position_embeddings") if key in left]
    fields["max_position_embeddings"] = min(lengths, default=POSITIONS)
    return fields


def _typed(name: str, value: Any) -> Any:
    """A size, or norm_eps, in its type; raises FieldError if it can't be converted."""
    if name == "norm_eps":
        return as_declared(name, value, float)
    size = as_declared(name, value, int)
    check_size(name, size)
    return size


def _attention(fields: dict[str, Any], window: int | list[int | None] | None) -> str:
    """Set the sliding window of the layers; returns the model type.

    `window` is one for all layers or a pattern that repeats. A window as long as a request may be counts as none.
    """
    fields["sliding_window"] = None
    pattern = window if isinstance(window, list) else [window]
    layers, longest = fields["num_hidden_layers"], fields["max_position_embeddings"]
    if layers % len(pattern):
        raise UnsupportedError(f"its {layers} layers can't repeat the {len(pattern)} windows of sliding_window")
    narrow = [one if one and one < longest else None for one in pattern]
    windows = {one for one in narrow if one}
    if len(windows) > 1:
        raise UnsupportedError(f"its layers have windows of {len(windows)} lengths (sliding_window); one is supported")
    fields["sliding_window"] = next(iter(windows), None)
    if not windows or None not in narrow:
        return "mistral"
    layer_types = ["sliding_attention" if one else "full_attention" for one in narrow]
    fields["layer_types"] = layer_types * (layers // len(pattern))
    return "ministral"


def _rope(fields: dict[str, Any], model_type: str, theta: float, yarn: Any, llama_4_scaling: Any) -> str:
    """Set the rotary embedding; returns the model type.

    `llama_4_scaling` scales the attention scores by position, which only the class of Ministral 3 supports.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if yarn is not None:
        yarn = dict(yarn)
        rope = {"rope_type": "yarn", "rope_theta": theta, ORIGINAL: int(yarn.pop(ORIGINAL))}
        rope |= {ours: float(yarn.pop(theirs)) for theirs, ours in YARN.items() if theirs in yarn}
        if not yarn.pop("apply_scale", True):
            rope["attention_factor"] = 1.0
        if yarn:
            raise UnsupportedError(f"its yarn has {', '.join(sorted(yarn))}, which isn't supported")
    fields["rope_parameters"] = rope
    if llama_4_scaling is None:
        return model_type
    if model_type != "mistral":
        raise UnsupportedError("it has llama_4_scaling together with windows in some layers, which isn't supported")
    if rope.get(ORIGINAL, llama_4_scaling[ORIGINAL]) != llama_4_scaling[ORIGINAL]:
        raise UnsupportedError(f"its yarn and llama_4_scaling differ in {ORIGINAL}, which isn't supported")
    rope |= {ORIGINAL: llama_4_scaling[ORIGINAL], "llama_4_scaling_beta": llama_4_scaling["beta"]}
    return "ministral3"


def _moe(fields: dict[str, Any], model_type: str, moe: Mapping[str, Any]) -> str:
    left = {key: value for key, value in moe.items() if not _is_off(value)}
    fields["num_local_experts"] = left.pop("num_experts")
    fields["num_experts_per_tok"] = left.pop("num_experts_per_tok")
    if left:
        raise UnsupportedError(f"its moe has {', '.join(sorted(left))}, which isn't supported")
    if model_type != "mistral":
        raise UnsupportedError("it has experts (moe) together with windows in some layers or llama_4_scaling")
    return "mixtral"


def _quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    if "quant_method" in config:
        return dict(config)
    form = config.get("qformat_weight")
    if form != "fp8_e4m3":
        raise UnsupportedError(f"its weights are quantized as {form}, which isn't supported; fp8_e4m3 is")
    return {"quant_method": "fp8"}
