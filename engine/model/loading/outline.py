"""Llama-like decoders as bare modules, for kernels that only take their weights.

Importing transformers' class takes longer than all the rest of a start. The C++ kernels compute nothing with it: they
need the names, the shapes and the rotary frequencies. An outline has these, under the same paths as the class.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.model.checkpoints.weight_mapping import map_exactly
from engine.model.loading.meta_model import MetaModel
from engine.model.loading.weight_sources import checkpoint_source, share_tied
from engine.model.model_info import ModelInfo, checkpoint_tensors, read_hf_config

Progress = Callable[[int, int], None]  # bytes read, bytes in all

# The other types choose their frequencies by lengths.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True, slots=True)
class Parts:
    """What not all of these decoders have. A string is the field of the config that says whether it does."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    head_norms: bool = False  # of queries and keys
    rotary_layers: str = ""  # the field that says which layers rotate; empty: all do


# By model type. Outlines of all of them are compared with the classes in the tests.
PARTS = {
    "llama": Parts("attention_bias", "attention_bias", "mlp_bias"),
    "mistral": Parts(),
    "qwen2": Parts(qkv_bias=True),
    "qwen3": Parts("attention_bias", "attention_bias", head_norms=True),
    "smollm3": Parts("attention_bias", "attention_bias", "mlp_bias", rotary_layers="no_rope_layers"),
}


def open_outline(config: EngineConfig, model_info: ModelInfo, progress: Progress | None = None) -> MetaModel | None:
    """The outline of a model and the source of its weights.

    None if there is no outline of its type, or if the tensors of the checkpoint are not exactly those of the outline:
    then `open_model` opens the class, which knows older names and reports what is missing.

    Args:
        config: the engine's configuration.
        model_info: of the whole model.
        progress: called with the bytes read and the total while weights are filled.
    """
    if config.load_format == "dummy" or model_info.pooling is not None or model_info.mm is not None:
        return None
    hf_config = read_hf_config(model_info.path, config, plain=True)
    if hf_config.model_type not in PARTS or not _has_plain_frequencies(hf_config.rope_parameters or {}):
        return None
    model = Outline(hf_config, getattr(torch, model_info.dtype)).eval().requires_grad_(False)
    stored = checkpoint_tensors(config, model_info.path, hf_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mapping = map_exactly({name: tensor.shape for name, tensor in stored.items()}, shapes)
    if mapping is None or share_tied(mapping, model):
        return None
    return MetaModel(model, checkpoint_source(stored, mapping, progress))


class Outline(nn.Module):
    """The modules of a causal language model with its parameters on the meta device. It can't be called.

    Args:
        config: transformers' config, or a plain one.
        dtype: of the parameters.
    """

    base_model_prefix = "model"

    def __init__(self, config: Any, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.model = Decoder(config, dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def base_model(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: Any, dtype: torch.dtype):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device="meta", dtype=dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, layer, dtype) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary_emb = RotaryEmbedding(config)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, config: Any, layer: int, dtype: torch.dtype):
        super().__init__()
        self.self_attn = Attention(config, layer, dtype)
        self.mlp = MLP(config, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)


class Attention(nn.Module):
    """Linears of queries, keys, values and outputs, and norms of queries and keys if the type has them."""

    def __init__(self, config: Any, layer: int, dtype: torch.dtype):
        super().__init__()
        parts, hidden = PARTS[config.model_type], config.hidden_size
        self.head_dim = _head_dim(config)
        self.scaling = self.head_dim**-0.5
        if parts.rotary_layers:
            self.use_rope = getattr(config, parts.rotary_layers)[layer]
        width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        bias = _has(config, parts.qkv_bias)
        self.q_proj = Linear(hidden, width, dtype, bias=bias)
        self.k_proj = Linear(hidden, kv_width, dtype, bias=bias)
        self.v_proj = Linear(hidden, kv_width, dtype, bias=bias)
        self.o_proj = Linear(width, hidden, dtype, bias=_has(config, parts.output_bias))
        if parts.head_norms:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype)


class MLP(nn.Module):
    """Linears of gate, up and down."""

    def __init__(self, config: Any, dtype: torch.dtype):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        bias = _has(config, PARTS[config.model_type].mlp_bias)
        self.gate_proj = Linear(hidden, inner, dtype, bias=bias)
        self.up_proj = Linear(hidden, inner, dtype, bias=bias)
        self.down_proj = Linear(inner, hidden, dtype, bias=bias)


class RMSNorm(nn.Module):
    """The weight and the epsilon of a norm."""

    def __init__(self, size: int, epsilon: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device="meta", dtype=dtype))
        self.variance_epsilon = epsilon


class RotaryEmbedding(nn.Module):
    """Frequencies [head_dim / 2] of rotary position embeddings: theta^(-2i / head_dim), or scaled ones.

    The formula is that of "RoFormer: Enhanced Transformer with Rotary Position Embedding" (Su et al.), section 3.2.2.
    """

    inv_freq: Tensor

    def __init__(self, config: Any):
        super().__init__()
        rope, self.attention_scaling = config.rope_parameters, 1.0
        if rope["rope_type"] in ("default", "llama3"):
            pairs = torch.arange(0, _head_dim(config), 2, dtype=torch.float)
            frequencies = 1.0 / rope["rope_theta"] ** (pairs / _head_dim(config))
            if rope["rope_type"] == "llama3":
                frequencies = _lowered(frequencies, rope)
        else:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            frequencies, self.attention_scaling = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        self.register_buffer("inv_freq", frequencies, persistent=False)


class Linear(nn.Linear):
    """A linear whose weight is on the meta device."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype, *, bias: bool):
        super().__init__(inputs, outputs, bias, device="meta", dtype=dtype)

    def reset_parameters(self) -> None:
        """Nothing: the values come from the checkpoint."""


class Embedding(nn.Embedding):
    """An embedding whose weight is on the meta device."""

    def reset_parameters(self) -> None:
        """Nothing: the values come from the checkpoint."""


def _has_plain_frequencies(rope: Mapping[str, Any]) -> bool:
    """Whether frequencies are the same at all positions, and for all of a head."""
    return rope.get("rope_type") in ROPE_TYPES and rope.get(PARTIAL) in (None, 1.0)


def _lowered(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Frequencies as Llama 3.1 scales them: long waves by the factor, short ones not, those between in part.

    The steps are those of transformers, so that the bits are the same. The formula is that of `apply_scaling` in the
    code of meta-llama/llama-models.
    """
    factor, low, high, original = (
        rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    lengths = 2 * math.pi / frequencies
    scaled = torch.where(lengths > original / low, frequencies / factor, frequencies)
    share = (original / lengths - low) / (high - low)
    between = (lengths >= original / high) & (lengths <= original / low)
    return torch.where(between, (1 - share) * scaled / factor + share * scaled, scaled)


def _has(config: Any, part: bool | str) -> bool:
    return bool(getattr(config, part)) if isinstance(part, str) else part


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
