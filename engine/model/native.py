"""Checkpoints in Mistral's own form (params.json, consolidated*.safetensors), told as transformers would have them.

Queries and keys differ in more than their names: Mistral rotates neighbouring rows of a head together, transformers
rows that lie half a head apart.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.model.checkpoint import Stored
from engine.model.config_file import as_declared, cause_of, check_size
from engine.model.names import CONFIG, PARAMS
from engine.model.quantised import Rounded, as_weights, settings_of

POSITIONS = 128_000  # Mistral's own code computes its rotary embedding so far
THETA, WINDOWED_THETA = 1e6, 1e4  # and takes these where params.json has none

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
IMAGES_OR_AUDIO = ("vision_encoder", "multimodal")
YARN = {"factor": "factor", "beta": "beta_fast", "alpha": "beta_slow"}
ORIGINAL = "original_max_position_embeddings"

LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
ENDS = {"qscale_weight": "weight_scale"}
ACTIVATION_SCALE = ".qscale_act"  # activations aren't rounded to eight bits here
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERTS = "feed_forward.", "block_sparse_moe."  # as the first checkpoints of Mixtral for transformers had them
_ROTATED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class Paired:
    """A tensor whose rows 2i and 2i + 1 of a head are rotated together; it is read with i and i + head_dim / 2 so."""

    of: Stored | Rounded
    head_dim: int

    @property
    def kind(self) -> str:
        return self.of.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def numbers(self) -> int:
        return self.of.numbers

    @property
    def bytes(self) -> int:
        return self.of.bytes


Readable = Stored | Rounded | Paired


def is_native(path: Path, tokenizer_mode: str) -> bool:
    """Whether a model's folder is read as Mistral's own: where that is asked for, or nothing else is there."""
    if not (path / PARAMS).is_file():
        return False
    return tokenizer_mode == "mistral" or not (path / CONFIG).is_file()


def as_transformers(stored: Mapping[str, Stored], config: Any) -> dict[str, Readable]:
    """The tensors of a native checkpoint under transformers' names, with its order of rows."""
    renamed = {name_of(name): one for name, one in stored.items() if not name.endswith(ACTIVATION_SCALE)}
    weights = as_weights(renamed, settings_of(config))
    return {name: Paired(one, config.head_dim) if _ROTATED.search(name) else one for name, one in weights.items()}


def name_of(name: str) -> str:
    """Transformers' name of a tensor; one that isn't known keeps its own."""
    module, _, end = name.rpartition(".")
    found = NAMES.get(module)
    layer = _LAYER.fullmatch(module)
    if layer is not None:
        number, path = layer.groups()
        inner = LAYER_NAMES.get(path)
        if inner is None and path.startswith(("feed_forward.experts.", "feed_forward.gate")):
            inner = path.replace(*_EXPERTS, 1)
        found = inner and f"model.layers.{number}.{inner}"
    return f"{found}.{ENDS.get(end, end)}" if found else name


def read_params(folder: Path, name: str) -> Any:
    """The transformers config that a folder's params.json stands for; ModelError if there is none, by field."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        params = json.loads((folder / PARAMS).read_text(encoding="utf-8-sig"))
        if not isinstance(params, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: {PARAMS} can't be read: {error}") from error
    try:
        kind, fields = _translate(params)
        architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
        return AutoConfig.for_model(kind, architectures=architectures, **fields)
    except _UnsupportedError as error:
        raise ModelError(f"{name} can't be run: {error} ({PARAMS})") from error
    except Exception as error:  # the class checks its fields in its own ways
        raise ModelError(f"{name}: {PARAMS} can't be read: {cause_of(error)}") from error


class _UnsupportedError(Exception):
    """A reason, as the end of a sentence about the model."""


def _translate(params: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A model type of transformers, and the fields of its config."""
    left = {key: value for key, value in params.items() if not _is_off(value)}
    for part in IMAGES_OR_AUDIO:
        if part in left:
            raise _UnsupportedError(f"it takes images or audio ({part}), which aren't supported yet")
    if left.pop("model_type", "transformer") != "transformer":
        raise _UnsupportedError(f"it is of kind {params['model_type']!r}; only transformers are supported")
    missing = [key for key in FIELDS if key not in left]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    fields = {ours: _typed(own, left.pop(own)) for own, ours in FIELDS.items()}
    fields |= {ours: left.pop(own) for own, ours in OPTIONS.items() if own in left}
    lengths = [_typed(key, left.pop(key)) for key in ("max_seq_len", "max_position_embeddings") if key in left]
    fields["max_position_embeddings"] = min(lengths, default=POSITIONS)
    window = left.pop("sliding_window", None) or left.pop("_sliding_window", None)
    theta = left.pop("rope_theta", WINDOWED_THETA if isinstance(window, int) else THETA)
    theta = as_declared("rope_theta", theta, float)
    kind = _attention(fields, window)
    kind = _rope(fields, kind, theta, left.pop("yarn", None), left.pop("llama_4_scaling", None))
    if "moe" in left:
        kind = _moe(fields, kind, left.pop("moe"))
    for key in ("quantization", "quantization_config"):
        if key in left:
            fields["quantization_config"] = _quantisation(left.pop(key))
    for key in WITHOUT_EFFECT:
        left.pop(key, None)
    if left:
        raise _UnsupportedError(f"it has {', '.join(sorted(left))}, which isn't supported")
    return kind, fields


def _typed(name: str, value: Any) -> Any:
    """A field that counts something, or norm_eps, in its type; FieldError names what is wrong with it."""
    if name == "norm_eps":
        return as_declared(name, value, float)
    size = as_declared(name, value, int)
    check_size(name, size)
    return size


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _attention(fields: dict[str, Any], window: int | list[int | None] | None) -> str:
    """One window for all layers, or a pattern that is repeated; one as long as a request may be is none."""
    fields["sliding_window"] = None
    pattern = window if isinstance(window, list) else [window]
    layers, longest = fields["num_hidden_layers"], fields["max_position_embeddings"]
    if layers % len(pattern):
        raise _UnsupportedError(f"its {layers} layers can't repeat the {len(pattern)} windows of sliding_window")
    narrow = [one if one and one < longest else None for one in pattern]
    windows = {one for one in narrow if one}
    if len(windows) > 1:
        raise _UnsupportedError(f"its layers have windows of {len(windows)} lengths (sliding_window); one is supported")
    fields["sliding_window"] = next(iter(windows), None)
    if not windows or None not in narrow:
        return "mistral"
    kinds = ["sliding_attention" if one else "full_attention" for one in narrow]
    fields["layer_types"] = kinds * (layers // len(pattern))
    return "ministral"


def _rope(fields: dict[str, Any], kind: str, theta: float, yarn: Any, growing: Any) -> str:
    """The rotary embedding; scores that grow with the position (llama_4_scaling) have a class of their own."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if yarn is not None:
        yarn = dict(yarn)
        rope = {"rope_type": "yarn", "rope_theta": theta, ORIGINAL: int(yarn.pop(ORIGINAL))}
        rope |= {ours: float(yarn.pop(own)) for own, ours in YARN.items() if own in yarn}
        if not yarn.pop("apply_scale", True):
            rope["attention_factor"] = 1.0
        if yarn:
            raise _UnsupportedError(f"its yarn has {', '.join(sorted(yarn))}, which isn't supported")
    fields["rope_parameters"] = rope
    if growing is None:
        return kind
    if kind != "mistral":
        raise _UnsupportedError("it has llama_4_scaling beside windows in some layers, which isn't supported")
    if rope.get(ORIGINAL, growing[ORIGINAL]) != growing[ORIGINAL]:
        raise _UnsupportedError(f"its yarn and llama_4_scaling differ in {ORIGINAL}, which isn't supported")
    rope |= {ORIGINAL: growing[ORIGINAL], "llama_4_scaling_beta": growing["beta"]}
    return "ministral3"


def _moe(fields: dict[str, Any], kind: str, moe: Mapping[str, Any]) -> str:
    left = {key: value for key, value in moe.items() if not _is_off(value)}
    fields["num_local_experts"] = left.pop("num_experts")
    fields["num_experts_per_tok"] = left.pop("num_experts_per_tok")
    if left:
        raise _UnsupportedError(f"its moe has {', '.join(sorted(left))}, which isn't supported")
    if kind != "mistral":
        raise _UnsupportedError("it has experts (moe) beside windows in some layers or llama_4_scaling")
    return "mixtral"


def _quantisation(settings: Mapping[str, Any]) -> dict[str, Any]:
    if "quant_method" in settings:
        return dict(settings)
    form = settings.get("qformat_weight")
    if form != "fp8_e4m3":
        raise _UnsupportedError(f"its weights are quantised as {form}, which isn't supported; fp8_e4m3 is")
    return {"quant_method": "fp8"}
