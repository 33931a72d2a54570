"""What must be known of a model before it is loaded: from its config.json and the headers of its safetensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import AUTO_LENGTH, EngineConfig, read_overrides
from engine.errors import ConfigError, ModelError
from engine.model import gate
from engine.model.checkpoint import Stored, headers
from engine.model.config_file import read_config_file
from engine.model.families import FAMILIES, Family
from engine.model.kvgroups import KVGroups, group_layers, layer_windows
from engine.model.native import Readable, as_transformers, is_native, read_params
from engine.model.quantised import as_weights, settings_of
from engine.model.resolve import resolve_model
from engine.pretrained import AUTO_MAP, build_causal_lm

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED_BYTES = {"int8": 1 + 2 / 64, "int4": 0.5 + 4 / 32}  # with the scales of their groups, see packing.GROUPS


@dataclass(frozen=True)
class ModelFacts:
    """Shapes and sizes of a model as it will run."""

    path: Path
    architecture: str
    dtype: str
    vocab_size: int
    max_model_len: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    weight_bytes: int
    kv_bytes_per_token: int  # in the layers that a block has room for
    windows: tuple[int, ...]  # of each layer: how many tokens a query sees, its own included; 0: all
    warnings: tuple[str, ...] = ()

    @property
    def kv_groups(self) -> KVGroups:
        return group_layers(self.windows)


def read_facts(config: EngineConfig) -> ModelFacts:
    """Read a model's facts.

    Raises ModelError for a model that can't be read or run, ConfigError for a length or dtype that it can't have.
    """
    path = resolve_model(config.model, dummy=config.load_format == "dummy")
    model = read_config(path, config)
    reason = gate.refusal(model)
    if reason is not None:
        raise ModelError(f"{config.model} can't be run: {reason}")
    _check_stored_quantization(config, model)
    stored = stored_tensors(config, path, model)
    parameters = sum(one.numbers for one in stored.values())
    dtype = _dtype(config, model, stored)
    heads = model.num_attention_heads
    kv_heads, head_dim = _cached_heads(model)
    layers = model.num_hidden_layers
    length = _max_model_len(config, model)
    windows = layer_windows(model, length)
    slots = group_layers(windows).slots
    warnings = []
    longest = scaled_length(model) or length
    if length > longest:
        warnings.append(
            f"--max-model-len {length} goes past the {longest} positions the model was trained "
            "on: good for measuring, not for reading what it writes there"
        )
    original = original_length(model)
    if original is not None and length > original:
        warnings.append(
            f"requests may have {length} positions, so the long factors of its rotary embedding hold for all of them: "
            f"--max-model-len {original} takes the short ones, which suit short texts better"
        )
    if getattr(model, AUTO_MAP, None):
        warnings.append(f"code that lies beside the model ({AUTO_MAP}) isn't run: transformers' own class is used")
    if model.model_type not in FAMILIES:
        warnings.append(f"models of kind {model.model_type!r} aren't in the parity suite: check the output")
    return ModelFacts(
        path=path,
        architecture=(getattr(model, "architectures", None) or [model.model_type])[0],
        dtype=dtype,
        vocab_size=model.vocab_size,
        max_model_len=length,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=model.hidden_size,
        intermediate_size=_intermediate_size(model),
        weight_bytes=_weight_bytes(config, model, parameters or _parameters(model), dtype),
        kv_bytes_per_token=2 * slots * kv_heads * cached_bytes(config.kv_cache_dtype or dtype, head_dim),
        windows=windows,
        warnings=tuple(warnings),
    )


def stored_tensors(config: EngineConfig, path: Path, model: Any) -> dict[str, Readable]:
    """The checkpoint's tensors under transformers' names; none for dummy weights."""
    if config.load_format == "dummy":
        return {}
    if is_native(path, config.tokenizer_mode):
        return as_transformers(headers(path, config.model, native=True), model)
    return dict(as_weights(headers(path, config.model), settings_of(model)))


def _cached_heads(model: Any) -> tuple[int, int]:
    """Heads of keys and values in the cache, and numbers of each; where values are shorter they are filled up."""
    heads = model.num_attention_heads
    if getattr(model, "kv_lora_rank", None):
        return heads, max(model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim)
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    return kv_heads, getattr(model, "head_dim", None) or model.hidden_size // heads


def _weight_bytes(config: EngineConfig, model: Any, parameters: int, dtype: str) -> int:
    """As they are held: the fused stack rounds linears where asked to, a rounded head beside the embedding."""
    item = ITEMSIZE[dtype]
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    plain = dtype == "float16" or width % 16 or config.kernels == "torch"  # what the stack has no kernels for
    if plain or not FAMILIES.get(model.model_type, Family()).fused or config.quantization is None:
        return parameters * item
    head = model.vocab_size * model.hidden_size
    without = parameters - (0 if model.tie_word_embeddings else head)
    attention = 2 * (model.num_attention_heads + model.num_key_value_heads) * width
    linears = model.num_hidden_layers * model.hidden_size * (attention + 3 * model.intermediate_size)
    rounded = QUANTISED_BYTES[config.quantization] * linears + QUANTISED_BYTES["int8"] * head
    return (without - linears) * item + int(rounded)


def cached_bytes(kind: str, head_dim: int) -> int:
    """Of one token's key, or value, in one head, in a cache of that kind; int8 has a scale beside it."""
    return head_dim + 4 if kind == "int8" else head_dim * ITEMSIZE[kind]


def read_config(path: Path, config: EngineConfig) -> Any:
    """The model's transformers config, with --num-layers applied; raises ModelError if it can't be read."""
    native = is_native(path, config.tokenizer_mode)
    if native and config.hf_overrides:
        raise ConfigError(
            f"--hf-overrides changes fields of config.json, but {config.model} is read by its params.json"
        )
    model = read_params(path, config.model) if native else read_config_file(path, config.model, overrides(config))
    if config.num_layers is not None:
        if config.load_format != "dummy":
            raise ConfigError("--num-layers needs --load-format dummy")
        model.num_hidden_layers = config.num_layers
        if getattr(model, "layer_types", None):
            kinds = model.layer_types
            model.layer_types = [kinds[i % len(kinds)] for i in range(config.num_layers)]
    return model


def overrides(config: EngineConfig) -> Mapping[str, Any]:
    """Fields of config.json that the user changes."""
    given = config.hf_overrides
    return read_overrides(given) if isinstance(given, str) else given or {}


def _check_stored_quantization(config: EngineConfig, model: Any) -> None:
    """--quantization with the name of a format of checkpoints asks for what the checkpoint is in, or for nothing."""
    wanted = config.stored_quantization
    method = str((settings_of(model) or {}).get("quant_method", "")).replace("_", "-").replace("gptqmodel", "gptq")
    if wanted is not None and wanted != method:
        stored = f"stored as {method}" if method else "not quantized"
        raise ConfigError(
            f"--quantization {wanted}: the weights of {config.model} are {stored}; here they can be quantized to int8 "
            "or int4"
        )


def _max_model_len(config: EngineConfig, model: Any) -> int:
    longest = scaled_length(model)
    wanted = None if config.max_model_len == AUTO_LENGTH else config.max_model_len
    if longest is None:
        if wanted is None:
            raise ConfigError(f"{config.model} doesn't say how long a request may be: give --max-model-len")
        return wanted
    # Plain rotary positions are defined at any length; tables and scaled ones are not.
    rope = getattr(model, "rope_parameters", None) or {}
    if wanted is not None and wanted > longest and rope.get("rope_type") != "default":
        raise ConfigError(f"--max-model-len {wanted} is more than the {longest} positions of {config.model}")
    return wanted or longest


def scaled_length(model: Any) -> int | None:
    """How many positions a model has, those that its rotary embedding is scaled to included; None if it doesn't say.

    Some files have the scaled length as max_position_embeddings, others the length before: then it is that times the
    factor of a yarn or linear scaling (Qwen2's instructions for 131,072 tokens: yarn of factor 4 over 32,768).
    Where kinds of layers have embeddings of their own (Gemma 3), linear ones are scaled to max_position_embeddings.
    """
    longest = getattr(model, "max_position_embeddings", None)
    rope = getattr(model, "rope_parameters", None) or {}
    nested = [parameters for parameters in rope.values() if isinstance(parameters, dict)]
    scaled = ("yarn", "longrope") if nested else ("yarn", "longrope", "linear")
    for parameters in nested or [rope]:
        kind, factor = parameters.get("rope_type"), parameters.get("factor")
        if longest is not None and kind in scaled and factor:
            before = longest if kind == "linear" else parameters.get("original_max_position_embeddings") or longest
            longest = max(longest, int(before * factor))
    return longest


def original_length(model: Any) -> int | None:
    """Up to how many positions the short factors of a longrope hold; None if the model has no such embedding."""
    rope = getattr(model, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope.get("original_max_position_embeddings") or model.original_max_position_embeddings)


def _intermediate_size(model: Any) -> int:
    """Width of the MLP's inner activation of one token; over all experts a token visits."""
    for name in ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner"):
        size = getattr(model, name, None)
        if size:
            return size * (getattr(model, "num_experts_per_tok", None) or 1)
    return 4 * model.hidden_size


def _dtype(config: EngineConfig, model: Any, stored: dict[str, Readable]) -> str:
    if config.dtype != "auto":
        return config.dtype
    named = getattr(model, "dtype", None)
    if named is not None:
        name = str(named).removeprefix("torch.")
    else:
        kinds = [one.kind for one in stored.values() if isinstance(one, Stored) and one.kind in ITEMSIZE]
        name = max(set(kinds), key=kinds.count) if kinds else "float32"
    if name not in ITEMSIZE:
        raise ModelError(f"{config.model} has weights of type {name}: give --dtype bfloat16 or float32")
    return name


def parameter_shapes(config: EngineConfig, facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights, under the names that the checkpoint has for them, or else the class."""
    model = read_config(facts.path, config)
    return {name: one.shape for name, one in stored_tensors(config, facts.path, model).items()} or _shapes(model)


def _parameters(model: Any) -> int:
    """Number of parameters of the class."""
    return sum(map(math.prod, _shapes(model).values()))


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the class, built without memory; tied ones count once."""
    import torch

    with torch.device("meta"):
        built = build_causal_lm(model, attn_implementation="eager")
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
