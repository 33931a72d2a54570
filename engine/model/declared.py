"""What simulated hardware must know of a model: from its config.json alone, without transformers and torch.

Only decoders of the Llama kind are known here (`KINDS`). Models with encoders are read by their classes, as everywhere
else (`engine.model.model_info`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model.config.file_names import CONFIG
from engine.model.kv_groups import group_layers, layer_windows
from engine.model.model_info import (
    ITEMSIZE,
    QUANTIZED_BYTES,
    ModelInfo,
    kv_head_bytes,
    read_model_info,
    request_length,
)
from engine.model.pooling import read_pooling
from engine.model.resolve import resolve_model
from engine.model.sharding.tp_plan import plan_tensor_parallel
from engine.multimodal.families import MM_FAMILIES

FP8 = "fp8"
FP8_METHODS = ("fp8", "fbgemm_fp8")
# Decoders whose layers are products of queries, keys and values, outputs, gate and up, down; whether the head is the
# embedding if the config doesn't say so.
KINDS = {"llama": False, "mistral": False, "phi3": False, "qwen2": False, "qwen3": False, "smollm3": True}
DEFAULT_WINDOWS = {"mistral": 4096}  # of the classes, for configs without the field

Size = Annotated[int, Meta(ge=1)]


class Decoder(Struct, kw_only=True):
    """The fields of a decoder's config.json that count here, as transformers' class has them."""

    model_type: str
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    vocab_size: Size
    max_position_embeddings: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: int | UnsetType | None = UNSET
    use_sliding_window: bool = False  # of Qwen's classes
    layer_types: tuple[str, ...] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    architectures: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        rope = dict(self.rope_parameters or self.rope_scaling or {})
        if "type" in rope:  # its name in older files
            rope.setdefault("rope_type", rope["type"])
        self.rope_parameters = rope if rope.get("rope_type") else {**rope, "rope_type": "default"}
        if self.sliding_window is UNSET:
            self.sliding_window = DEFAULT_WINDOWS.get(self.model_type)
        if self.model_type.startswith("qwen") and not self.use_sliding_window:
            self.sliding_window = None

    def get_text_config(self, decoder: bool = True) -> "Decoder":  # noqa: ARG002
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width(self) -> int:
        """Elements of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def linear_parameters(self) -> int:
        """Of all layers; biases and norms, less than a thousandth, are left out."""
        query, key_value = self.num_attention_heads * self.width, self.kv_heads * self.width
        attention = self.hidden_size * (2 * query + 2 * key_value)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def vocabulary_parameters(self) -> int:
        """Of the embedding and the head."""
        tied = KINDS[self.model_type] if self.tie_word_embeddings is None else self.tie_word_embeddings
        return self.vocab_size * self.hidden_size * (1 if tied else 2)


def read_declared(config: EngineConfig) -> ModelInfo:
    """The model of a configuration with simulated hardware; no weights are needed.

    Raises ModelError if it can't be read or is of a kind whose steps have no known times, ConfigError for a length or
    dtype that it can't have.
    """
    path = resolve_model(config.model, dummy=True)
    fields = _read_fields(path, config)
    dtype, notes = _dtype(config, fields)
    stored = stored_quantization(fields.get("quantization_config"))
    _check_stored(config, stored)
    in_fp8 = FP8 in (stored, config.quantization)
    if fields.get("model_type") in MM_FAMILIES:
        quantization = FP8 if in_fp8 else None
        changes: dict[str, Any] = {"dtype": dtype, "quantization": quantization, "stored_quantization": None}
        found = read_model_info(replace(config, load_format="dummy", **changes))
        _check_windows(config, found.windows)
        return replace(found, stored_fp8=stored == FP8, warnings=(*found.warnings, *notes))
    decoder = _decoder(config, fields)
    if read_pooling(config, path, decoder) is not None:
        raise ModelError(
            f"{config.name} returns vectors; simulated hardware has times for models that generate: use --runner "
            "generate, or another model"
        )
    length = request_length(config, decoder, None)
    windows = layer_windows(decoder, length)
    _check_windows(config, windows)
    itemsize = QUANTIZED_BYTES[FP8] if in_fp8 else ITEMSIZE[dtype]
    head = kv_head_bytes(config.kv_cache_dtype or dtype, decoder.width)
    return ModelInfo(
        path=path,
        architecture=(decoder.architectures or (decoder.model_type,))[0],
        dtype=dtype,
        vocab_size=decoder.vocab_size,
        max_model_len=length,
        num_layers=decoder.num_hidden_layers,
        num_heads=decoder.num_attention_heads,
        num_kv_heads=decoder.kv_heads,
        head_dim=decoder.width,
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        weight_bytes=int(decoder.linear_parameters * itemsize) + decoder.vocabulary_parameters * ITEMSIZE[dtype],
        kv_bytes_per_token=2 * group_layers(windows).group_size * decoder.kv_heads * head,
        windows=windows,
        warnings=notes,
        stored_fp8=stored == FP8,
    )


@dataclass(frozen=True, slots=True)
class Division:
    """As the fields of `engine.model.sharding.tp_plan.TPPlan` with these names."""

    rank_info: ModelInfo
    weight_bytes: int
    warnings: tuple[str, ...] = ()


def divide_declared(config: EngineConfig, model_info: ModelInfo) -> Division:
    """Divide a model among the ranks of simulated hardware; the weights of a text model in equal parts.

    As in vLLM, a rank has at least one head of keys and values, so that several ranks may have the same one. Raises
    ConfigError if dimensions aren't divisible.
    """
    ranks = config.tensor_parallel_size
    if model_info.mm is not None:
        plan = plan_tensor_parallel(replace(config, model=config.name, load_format="dummy"), model_info)
        return Division(plan.rank_info, plan.weight_bytes, plan.warnings)
    heads, kv_heads, inner = model_info.num_heads, model_info.num_kv_heads, model_info.intermediate_size

    def fits(count: int) -> bool:
        return heads % count == 0 and inner % count == 0 and (kv_heads % count == 0 or count % kv_heads == 0)

    if not fits(ranks):
        works = [str(count) for count in (1, 2, 4, 8, 16) if fits(count)]
        raise ConfigError(
            f"--tp {ranks} is not possible: {config.name} has {heads} heads, {kv_heads} heads of keys and values and "
            f"{inner} inner dimensions; it can be divided over {', '.join(works)} ranks"
        )
    rank_kv_heads = max(kv_heads // ranks, 1)
    rank_info = replace(
        model_info,
        num_heads=heads // ranks,
        num_kv_heads=rank_kv_heads,
        intermediate_size=inner // ranks,
        weight_bytes=-(-model_info.weight_bytes // ranks),
        kv_bytes_per_token=model_info.kv_bytes_per_token * rank_kv_heads // kv_heads,
    )
    return Division(rank_info, ranks * rank_info.weight_bytes)


def _read_fields(path: Path, config: EngineConfig) -> dict[str, Any]:
    file = path / CONFIG if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config.name}: {file.name} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{config.name}: {file.name} is not a JSON object")
    overrides = config.hf_overrides or {}
    assert not isinstance(overrides, str), "EngineConfig has read the JSON text"
    if {"rope_scaling", "rope_parameters"} & overrides.keys():
        found = {key: value for key, value in found.items() if key not in ("rope_scaling", "rope_parameters")}
    return {**found, **overrides}


def _decoder(config: EngineConfig, fields: Mapping[str, Any]) -> Decoder:
    model_type = fields.get("model_type")
    if model_type not in KINDS:
        raise ModelError(
            f"simulated hardware has no times for {config.name}, a model of type {model_type!r}; it has them for "
            f"decoders of the types {', '.join(KINDS)}, and for models with images on such decoders"
        )
    try:
        decoder = msgspec.convert(fields, Decoder)
    except msgspec.ValidationError as error:
        raise ModelError(f"{config.name}: its {CONFIG} can't be used: {error}") from error
    if decoder.num_attention_heads % decoder.kv_heads:
        raise ModelError(
            f"{config.name}: num_attention_heads ({decoder.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({decoder.kv_heads})"
        )
    if config.num_layers is not None:
        decoder.num_hidden_layers = config.num_layers
        decoder.layer_types = None
    return decoder


def _check_windows(config: EngineConfig, windows: tuple[int, ...]) -> None:
    """Raise ConfigError for layers whose tokens don't see all tokens before them."""
    window = max(windows)
    if window:
        raise ConfigError(
            f"{config.name} has layers that see {window} tokens only, which the times of simulated hardware don't "
            f"include: use --max-model-len {window} or less"
        )


def _dtype(config: EngineConfig, fields: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The dtype of weights and activations, and what the user should know about it."""
    if config.dtype not in ("auto", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {config.dtype}: simulated hardware computes in bfloat16 or float16")
    text = fields.get("text_config")
    declared = next(
        (
            one[key]
            for one in (fields, text)
            if isinstance(one, dict)
            for key in ("dtype", "torch_dtype")
            if one.get(key)
        ),
        "bfloat16",
    )
    dtype = str(declared).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    if dtype in ("bfloat16", "float16"):
        return dtype, ()
    return "bfloat16", (f"the weights are stored in {dtype}; they are computed in bfloat16, as on GPUs",)


def stored_quantization(found: Mapping[str, Any] | None) -> str:
    """The format of a checkpoint's weights: fp8, the name of another one, or empty."""
    if not found:
        return ""
    method = str(found.get("quant_method", ""))
    if method in FP8_METHODS or str(found.get("quant_algo", "")).lower() == FP8:
        return FP8
    groups = found.get("config_groups") or {}
    weights = [one.get("weights") or {} for one in groups.values() if isinstance(one, dict)]
    if weights and all(one.get("type") == "float" and one.get("num_bits") == 8 for one in weights):
        return FP8
    return method or "an unknown format"


def _check_stored(config: EngineConfig, stored: str) -> None:
    """Raise an error for a checkpoint in a quantized format other than fp8, or not in the format that is asked for."""
    if stored not in ("", FP8):
        raise ModelError(
            f"simulated hardware has no times for weights stored as {stored}, as those of {config.name} are: use a "
            "checkpoint in bfloat16 or fp8"
        )
    if config.stored_quantization is not None and stored != FP8:
        raise ConfigError(
            f"--quantization {config.stored_quantization}: the weights of {config.name} are not quantized; simulated "
            "hardware can quantize them to fp8"
        )
