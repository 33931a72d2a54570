"""What must be known of a model before it is loaded: from its config.json and the headers of its safetensors."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.model import gate
from engine.model.resolve import resolve_model

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED_BYTES = {"int8": 1 + 2 / 64, "int4": 0.5 + 4 / 32}  # with the scales of their groups, see packing.GROUPS
_HEADER_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INDEX = "model.safetensors.index.json"


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
    kv_bytes_per_token: int
    warnings: tuple[str, ...] = ()


def read_facts(config: EngineConfig) -> ModelFacts:
    """Read a model's facts.

    Raises ModelError for a model that can't be read or run, ConfigError for a length or dtype that it can't have.
    """
    path = resolve_model(config.model)
    model = read_config(path, config)
    reason = gate.refusal(model)
    if reason is not None:
        raise ModelError(f"{config.model} can't be run: {reason}")
    headers = {} if config.load_format == "dummy" else _headers(path, config.model)
    dtype = _dtype(config, model, headers)
    heads = model.num_attention_heads
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // heads
    layers = model.num_hidden_layers
    length = _max_model_len(config, model)
    warnings = []
    if length > (getattr(model, "max_position_embeddings", None) or length):
        warnings.append(
            f"--max-model-len {length} goes past the {model.max_position_embeddings} positions the model was trained "
            "on: good for measuring, not for reading what it writes there"
        )
    if model.model_type not in gate.TESTED:
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
        weight_bytes=_weight_bytes(config, model, sum(map(_size, headers.values())) or _parameters(model), dtype),
        kv_bytes_per_token=2 * layers * kv_heads * cached_bytes(config.kv_cache_dtype or dtype, head_dim),
        warnings=tuple(warnings),
    )


def _weight_bytes(config: EngineConfig, model: Any, parameters: int, dtype: str) -> int:
    """As they are held: the fused stack rounds linears where asked to, a rounded head beside the embedding."""
    item = ITEMSIZE[dtype]
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    plain = dtype == "float16" or width % 16 or config.kernels == "torch"  # what the stack has no kernels for
    if plain or model.model_type not in gate.FUSED or config.quantization is None:
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
    from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = str(error).strip().split("\n")[0]
        raise ModelError(f"{config.model}: config.json can't be read: {cause}") from error
    if config.num_layers is not None:
        if config.load_format != "dummy":
            raise ConfigError("--num-layers needs --load-format dummy")
        model.num_hidden_layers = config.num_layers
        if getattr(model, "layer_types", None):
            kinds = model.layer_types
            model.layer_types = [kinds[i % len(kinds)] for i in range(config.num_layers)]
    return model


def _max_model_len(config: EngineConfig, model: Any) -> int:
    longest = getattr(model, "max_position_embeddings", None)
    wanted = config.max_model_len
    if longest is None:
        if wanted is None:
            raise ConfigError(f"{config.model} doesn't say how long a request may be: give --max-model-len")
        return wanted
    # Plain rotary positions are defined at any length; tables and scaled ones are not.
    rope = getattr(model, "rope_parameters", None) or {}
    if wanted is not None and wanted > longest and rope.get("rope_type") != "default":
        raise ConfigError(f"--max-model-len {wanted} is more than the {longest} positions of {config.model}")
    return wanted or longest


def _intermediate_size(model: Any) -> int:
    """Width of the MLP's inner activation of one token; over all experts a token visits."""
    for name in ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner"):
        size = getattr(model, name, None)
        if size:
            return size * (getattr(model, "num_experts_per_tok", None) or 1)
    return 4 * model.hidden_size


def _dtype(config: EngineConfig, model: Any, headers: dict[str, Any]) -> str:
    if config.dtype != "auto":
        return config.dtype
    named = getattr(model, "dtype", None)
    if named is not None:
        name = str(named).removeprefix("torch.")
    else:
        stored = [_HEADER_DTYPES[entry["dtype"]] for entry in headers.values() if entry["dtype"] in _HEADER_DTYPES]
        name = max(set(stored), key=stored.count) if stored else "float32"
    if name not in ITEMSIZE:
        raise ModelError(f"{config.model} has weights of type {name}: give --dtype bfloat16 or float32")
    return name


def _headers(path: Path, name: str) -> dict[str, Any]:
    """Entries of all tensors in the folder's safetensors files: {tensor: {"dtype", "shape"}}."""
    if not path.is_dir():
        raise ModelError(f"{name} is a config without weights: --load-format dummy runs it with random ones")
    index = path / INDEX
    if index.exists():
        files = sorted({path / file for file in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(path.glob("model*.safetensors"))
    if not files and not any(path.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{name} has a config.json but no weights (model.safetensors): --load-format dummy runs it with random ones"
        )
    entries: dict[str, Any] = {}
    for file in files:
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        except (OSError, ValueError) as error:
            raise ModelError(f"{name}: {file.name} is missing or isn't a safetensors file: {error}") from error
        header.pop("__metadata__", None)
        entries.update(header)
    return entries


def _size(entry: dict[str, Any]) -> int:
    return math.prod(entry["shape"])


def parameter_shapes(config: EngineConfig, facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights, under the names that the checkpoint has for them, or else the class."""
    headers = {} if config.load_format == "dummy" else _headers(facts.path, config.model)
    stored = {name: tuple(entry["shape"]) for name, entry in headers.items()}
    return stored or _shapes(read_config(facts.path, config))


def _parameters(model: Any) -> int:
    """Number of parameters of the class."""
    return sum(map(math.prod, _shapes(model).values()))


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of the class, built without memory; tied ones count once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model)
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
