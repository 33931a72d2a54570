"""Reads what must be known of a model before it is loaded, from its config.json and the headers of its weights."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import AUTO_LENGTH, KV_CACHE_DTYPES, EngineConfig
from engine.errors import ConfigError, ModelError
from engine.json_options import read_overrides
from engine.model import molmo
from engine.model.checkpoints.mistral_tensors import CheckpointTensor, as_transformers_tensors
from engine.model.checkpoints.quantized import merge_quantized, quantization_config
from engine.model.checkpoints.safetensors_headers import StoredTensor, read_headers
from engine.model.config.config_json import ORIGINAL, read_config_json
from engine.model.config.file_names import is_mistral_format
from engine.model.config.mistral_params import read_mistral_params
from engine.model.config.plain_config import PlainConfig
from engine.model.config.unsupported import unsupported_reason
from engine.model.families import Family, family_of, is_encoder, lost_positions
from engine.model.kv_groups import KVGroups, group_layers, groups_of_stage, layer_windows
from engine.model.mm_facts import MMFacts, read_mm_facts
from engine.model.pooling import read_pooling, with_tied_head
from engine.model.resolve import resolve_model
from engine.model.stage import Stage
from engine.multimodal.families import MM_FAMILIES
from engine.pooling import PoolingSpec
from engine.pretrained import AUTO_MAP, build_causal_lm, build_encoder

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes per weight, with the scales of its group; fp8 has a float32 scale for each output besides.
QUANTIZED_BYTES = {"int8": 1 + 2 / 64, "int4": 0.5 + 4 / 32, "fp8": 1}


@dataclass(frozen=True)
class ModelInfo:
    """Shapes and sizes of a model as it will run; of one rank's shard if it belongs to a rank."""

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
    kv_bytes_per_token: int  # of one token's keys and values in a block, for all layers of a KV group
    windows: tuple[int, ...]  # tokens that a query sees, its own included, per layer; 0 for all. Encoders: none
    warnings: tuple[str, ...] = ()
    mm: MMFacts | None = None  # None: the model takes texts only
    pooling: PoolingSpec | None = None  # None: the model generates
    stored_fp8: bool = False  # as simulated hardware runs it; elsewhere the weights of a checkpoint are dequantized
    stage: Stage | None = None  # of a rank with --pp: which of the `num_layers` layers it has; None: all

    @property
    def kv_groups(self) -> KVGroups:
        groups = group_layers(self.windows)
        return groups if self.stage is None else groups_of_stage(groups, self.stage.layers)

    @property
    def layers(self) -> range:
        """The numbers of the layers that are computed."""
        return range(self.num_layers) if self.stage is None else self.stage.layers


def read_model_info(config: EngineConfig) -> ModelInfo:
    """Find a model, fetching it if necessary, and read its config and the headers of its weights.

    Raises ModelError for a model that can't be read or run, ConfigError for a length or dtype that it can't have.
    """
    path = resolve_model(config.model, dummy=config.load_format == "dummy")
    hf_config = read_hf_config(path, config, plain=config.load_format != "dummy")
    pooling = read_pooling(config, path, hf_config)
    reason = unsupported_reason(hf_config)
    if reason is not None:
        raise ModelError(f"{config.model} can't be run: {reason}")
    if pooling is not None:
        hf_config = with_tied_head(hf_config)
    _check_stored_quantization(config, hf_config)
    tensors = checkpoint_tensors(config, path, hf_config)
    if not tensors and isinstance(hf_config, PlainConfig):
        hf_config = read_hf_config(path, config)  # a class is built to count parameters
    parameters = sum(tensor.numel for tensor in tensors.values())
    dtype = _dtype(config, hf_config, tensors)
    decoder = hf_config.get_text_config(decoder=True)
    kv_heads, head_dim = _cached_heads(decoder)
    length = request_length(config, decoder, pooling)
    windows = () if is_encoder(hf_config) else layer_windows(decoder, length)
    mm = _mm_facts(config, path, hf_config, dtype, length)
    group_size = group_layers(windows).group_size
    return ModelInfo(
        path=path,
        architecture=(getattr(hf_config, "architectures", None) or [hf_config.model_type])[0],
        dtype=dtype,
        vocab_size=decoder.vocab_size,
        max_model_len=length,
        num_layers=decoder.num_hidden_layers,
        num_heads=decoder.num_attention_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=decoder.hidden_size,
        intermediate_size=_intermediate_size(decoder),
        weight_bytes=_weight_bytes(config, hf_config, parameters or _count_parameters(hf_config), dtype),
        kv_bytes_per_token=2 * group_size * kv_heads * kv_head_bytes(config.kv_cache_dtype or dtype, head_dim),
        windows=windows,
        warnings=(*_warnings(hf_config, length), *(mm.warnings if mm else ())),
        mm=mm,
        pooling=pooling,
    )


def _mm_facts(config: EngineConfig, path: Path, hf_config: Any, dtype: str, length: int) -> MMFacts | None:
    """The facts about the inputs of a model; None if it takes texts only."""
    options = config.mm_processor_kwargs or {}
    assert not isinstance(options, str), "EngineConfig has read the JSON text"
    facts = read_mm_facts(
        path, hf_config, ITEMSIZE[dtype], length, options, config.per_prompt, config.media_options.limits.video_frames
    )
    if facts is None:
        return None
    outside = [math.prod(shape) for name, shape in _composite_shapes(hf_config).items() if "/" in name]
    return replace(facts, encoder_parameters=sum(outside))


def _warnings(hf_config: Any, length: int) -> tuple[str, ...]:
    warnings, decoder = [], hf_config.get_text_config(decoder=True)
    longest = max_positions(decoder) or length
    if length > longest:
        warnings.append(
            f"--max-model-len {length} exceeds the {longest} positions the model was trained on: suitable for "
            "measuring only; output beyond that length is poor"
        )
    original = longrope_original_length(decoder)
    if original is not None and length > original:
        warnings.append(
            f"requests may have {length} positions, so the long factors of its rotary embedding (longrope) are used "
            f"for all requests: --max-model-len {original} selects the short ones, which suit short texts better"
        )
    if getattr(hf_config, AUTO_MAP, None):
        own = "Redline's" if hf_config.model_type == molmo.MODEL_TYPE else "transformers'"
        warnings.append(f"the model's custom code ({AUTO_MAP}) isn't run: {own} own class is used")
    if family_of(decoder.model_type) is None and not is_encoder(hf_config):
        warnings.append(f"models of type {decoder.model_type!r} aren't in the parity suite: check the output")
    return tuple(warnings)


def checkpoint_tensors(config: EngineConfig, path: Path, hf_config: Any) -> dict[str, CheckpointTensor]:
    """The checkpoint's tensors under transformers' names; none for dummy weights."""
    if config.load_format == "dummy":
        return {}
    if is_mistral_format(path, config.tokenizer_mode):
        return as_transformers_tensors(read_headers(path, config.model, mistral=True), hf_config)
    return dict(merge_quantized(read_headers(path, config.model), quantization_config(hf_config)))


def _cached_heads(hf_config: Any) -> tuple[int, int]:
    """Number of heads in the KV cache, and elements of each; shorter values (DeepSeek) are padded."""
    heads = hf_config.num_attention_heads
    if getattr(hf_config, "kv_lora_rank", None):
        return heads, max(hf_config.qk_nope_head_dim + hf_config.qk_rope_head_dim, hf_config.v_head_dim)
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads


def _weight_bytes(config: EngineConfig, hf_config: Any, parameters: int, dtype: str) -> int:
    """Size of the weights in memory.

    With `--quantization` linears of the decoder are quantized, and so is the head, in addition to the embedding if they
    are tied.
    """
    item, kind = ITEMSIZE[dtype], config.quantization
    if kind is None:
        return parameters * item
    linears, decoder = _linear_shapes(hf_config), hf_config.get_text_config(decoder=True)
    head = decoder.vocab_size, decoder.hidden_size
    plain = parameters - sum(math.prod(shape) * count for shape, count in linears.items())
    if not hf_config.tie_word_embeddings:
        plain -= math.prod(head)
    quantized = sum(_quantized_bytes(kind, *shape) * count for shape, count in linears.items())
    return plain * item + int(quantized + _quantized_bytes("int8" if kind == "int4" else kind, *head))


def _linear_shapes(hf_config: Any) -> Counter[tuple[int, int]]:
    """How many linears of each shape (outputs, inputs) the decoder layers have."""
    decoder = hf_config.get_text_config(decoder=True)
    if not (family_of(decoder.model_type) or Family()).fused:
        return _class_linear_shapes(hf_config)
    hidden, inner, heads = decoder.hidden_size, decoder.intermediate_size, decoder.num_attention_heads
    head_dim = getattr(decoder, "head_dim", None) or hidden // heads
    width, kv_width = heads * head_dim, decoder.num_key_value_heads * head_dim
    shapes = [(width, hidden), *[(kv_width, hidden)] * 2, (hidden, width), *[(inner, hidden)] * 2, (hidden, inner)]
    return Counter(shapes * decoder.num_hidden_layers)


def _quantized_bytes(kind: str, outputs: int, inputs: int) -> float:
    scales = 4 * outputs if kind == "fp8" else 0
    return QUANTIZED_BYTES[kind] * outputs * inputs + scales


def kv_head_bytes(cache_dtype: str, head_dim: int) -> int:
    """Bytes of one key, or one value, of a head in the KV cache; in 8 bits it includes a float32 scale."""
    return head_dim + 4 if cache_dtype in KV_CACHE_DTYPES else head_dim * ITEMSIZE[cache_dtype]


def read_hf_config(path: Path, config: EngineConfig, *, plain: bool = False) -> Any:
    """The model's transformers config, with --hf-overrides and --num-layers applied.

    With `plain` it may be a `PlainConfig`, with which no class can be built. Raises ModelError if it can't be read,
    ConfigError if a flag does not apply to it.
    """
    mistral = is_mistral_format(path, config.tokenizer_mode)
    if mistral and config.hf_overrides:
        raise ConfigError(
            f"--hf-overrides changes fields of config.json, but {config.model} is read by its params.json"
        )
    if mistral:
        hf_config = read_mistral_params(path, config.model)
    else:
        hf_config = read_config_json(path, config.model, _hf_overrides(config), plain=plain)
    if config.num_layers is not None:
        if config.load_format != "dummy":
            raise ConfigError("--num-layers needs --load-format dummy")
        decoder = hf_config.get_text_config(decoder=True)
        decoder.num_hidden_layers = config.num_layers
        if getattr(decoder, "layer_types", None):
            layer_types = decoder.layer_types
            decoder.layer_types = [layer_types[i % len(layer_types)] for i in range(config.num_layers)]
    return hf_config


def _hf_overrides(config: EngineConfig) -> Mapping[str, Any]:
    """Fields of config.json that the user changes."""
    given = config.hf_overrides
    return read_overrides(given) if isinstance(given, str) else given or {}


def _check_stored_quantization(config: EngineConfig, hf_config: Any) -> None:
    """Raise ConfigError if --quantization names a checkpoint format that the checkpoint doesn't have."""
    wanted = config.stored_quantization
    method = str((quantization_config(hf_config) or {}).get("quant_method", ""))
    method = method.replace("_", "-").replace("gptqmodel", "gptq")
    if wanted is not None and wanted != method:
        stored = f"stored as {method}" if method else "not quantized"
        raise ConfigError(
            f"--quantization {wanted}: the weights of {config.model} are {stored}; here they can be quantized to int8 "
            "or int4"
        )


def request_length(config: EngineConfig, hf_config: Any, pooling: PoolingSpec | None) -> int:
    """The most tokens of a request of a decoder. Raises ConfigError for a length that it can't have."""
    longest = max_positions(hf_config)
    if longest is not None and is_encoder(hf_config):
        longest -= lost_positions(hf_config)
    wanted = None if config.max_model_len == AUTO_LENGTH else config.max_model_len
    if wanted is None and pooling is not None and pooling.most_tokens:
        wanted = min(pooling.most_tokens, longest or pooling.most_tokens)
    if longest is None:
        if wanted is None:
            raise ConfigError(f"{config.model}: its config has no maximum length: give --max-model-len")
        return wanted
    # Plain rotary positions are defined at any length; tables and scaled ones are not.
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if wanted is not None and wanted > longest and rope.get("rope_type") != "default":
        raise ConfigError(f"--max-model-len {wanted} is more than the {longest} positions of {config.model}")
    return wanted or longest


def max_positions(hf_config: Any) -> int | None:
    """How many positions a model has, with those that its rotary embedding is scaled to; None if the config has none.

    Some files have the scaled length as max_position_embeddings. Others have the length before scaling: then the
    result is that length times the factor of a yarn or linear scaling (Qwen2 with 131,072 positions: yarn of
    factor 4 over 32,768). If layer types have embeddings of their own (Gemma 3), linear ones are scaled to
    max_position_embeddings.
    """
    longest = getattr(hf_config, "max_position_embeddings", None)
    rope = getattr(hf_config, "rope_parameters", None) or {}
    nested = [parameters for parameters in rope.values() if isinstance(parameters, dict)]
    scaled = ("yarn", "longrope") if nested else ("yarn", "longrope", "linear")
    for parameters in nested or [rope]:
        rope_type, factor = parameters.get("rope_type"), parameters.get("factor")
        if longest is not None and rope_type in scaled and factor:
            original = None if rope_type == "linear" else parameters.get(ORIGINAL)
            longest = max(longest, int((original or longest) * factor))
    return longest


def longrope_original_length(hf_config: Any) -> int | None:
    """Number of positions up to which a longrope uses its short factors; None for other rotary embeddings."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope.get(ORIGINAL) or hf_config.original_max_position_embeddings)


def _intermediate_size(hf_config: Any) -> int:
    """Width of the MLP's inner activation of one token, summed over the experts that a token visits."""
    for name in ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner"):
        size = getattr(hf_config, name, None)
        if size:
            return size * (getattr(hf_config, "num_experts_per_tok", None) or 1)
    return 4 * hf_config.hidden_size


def _dtype(config: EngineConfig, hf_config: Any, tensors: dict[str, CheckpointTensor]) -> str:
    if config.dtype != "auto":
        return config.dtype
    declared = getattr(hf_config, "dtype", None) or getattr(hf_config.get_text_config(decoder=True), "dtype", None)
    if declared is not None:
        name = str(declared).removeprefix("torch.")
    else:
        plain = [one.dtype for one in tensors.values() if isinstance(one, StoredTensor) and one.dtype in ITEMSIZE]
        name = max(set(plain), key=plain.count) if plain else "float32"
    if name not in ITEMSIZE:
        raise ModelError(f"{config.model} has weights of type {name}: give --dtype bfloat16 or float32")
    return name


def weight_shapes(config: EngineConfig, model_info: ModelInfo) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights, under the names of the checkpoint; with dummy weights under those of the class.

    Of a model with towers under those of the class; those of towers have slashes in place of dots, so that nothing
    takes their layers for the decoder's.
    """
    hf_config = read_hf_config(model_info.path, config)
    if hf_config.model_type in MM_FAMILIES:
        return _composite_shapes(hf_config)
    tensors = checkpoint_tensors(config, model_info.path, hf_config)
    return {name: tensor.shape for name, tensor in tensors.items()} or _shapes(hf_config)


def _composite_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    from engine.model.composed_decoder import decoder_of

    model = _empty_model(hf_config)
    own = {id(parameter) for parameter in decoder_of(model).parameters()}
    named = model.named_parameters()
    return {name if id(one) in own else name.replace(".", "/"): tuple(one.shape) for name, one in named}


def _count_parameters(hf_config: Any) -> int:
    return sum(map(math.prod, _shapes(hf_config).values()))


def _class_linear_shapes(hf_config: Any) -> Counter[tuple[int, int]]:
    """As `_linear_shapes`, from the class."""
    from engine.model.composed_decoder import decoder_of
    from engine.model.linears import quantizable_linears

    model = decoder_of(_empty_model(hf_config))
    found = quantizable_linears(model)
    if isinstance(found, str):  # the worker, which has the model as well, refuses it
        return Counter()
    head = model.get_output_embeddings()
    return Counter((one.out_features, one.in_features) for one in found.values() if one is not head)


def _shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the class; tied ones count once."""
    return {name: tuple(parameter.shape) for name, parameter in _empty_model(hf_config).named_parameters()}


def _empty_model(hf_config: Any) -> Any:
    """The class, built without memory."""
    import torch

    from engine.model.composed_decoder import build_composite

    build = build_composite if hf_config.model_type in MM_FAMILIES else build_causal_lm
    with torch.device("meta"):
        if is_encoder(hf_config):
            return build_encoder(hf_config, classifies=False)
        return build(hf_config, attn_implementation="eager")
