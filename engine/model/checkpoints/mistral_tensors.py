"""Tensors of Mistral's own format (consolidated*.safetensors), presented with the names and layout of transformers.

Queries and keys differ in the order of their rows too: Mistral rotates neighboring rows of a head together,
transformers rows that are half a head apart.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.model.checkpoints.quantized import QuantizedWeight, merge_quantized, quantization_config
from engine.model.checkpoints.safetensors_headers import StoredTensor

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
SUFFIXES = {"qscale_weight": "weight_scale"}
ACTIVATION_SCALE = ".qscale_act"  # not used: activations are not quantized to eight bits here
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERTS = "feed_forward.", "block_sparse_moe."  # as the first checkpoints of Mixtral for transformers had them
_ROTATED = re.compile(r"\.(q|k)_proj\.(weight|bias)$")


@dataclass(frozen=True, slots=True)
class InterleavedRows:
    """Queries or keys in Mistral's order of rows; reading them gives transformers' order.

    Stored rows 2i and 2i + 1 of a head become its rows i and i + head_dim / 2. With head_dim 4: 0 1 2 3 -> 0 2 1 3.
    """

    inner: StoredTensor | QuantizedWeight
    head_dim: int

    @property
    def dtype(self) -> str:
        return self.inner.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def numel(self) -> int:
        return self.inner.numel

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes


CheckpointTensor = StoredTensor | QuantizedWeight | InterleavedRows


def as_transformers_tensors(stored: Mapping[str, StoredTensor], hf_config: Any) -> dict[str, CheckpointTensor]:
    """Present the tensors of a Mistral checkpoint under transformers' names, in its order of rows."""
    renamed = {name_of(name): tensor for name, tensor in stored.items() if not name.endswith(ACTIVATION_SCALE)}
    weights = merge_quantized(renamed, quantization_config(hf_config))
    return {
        name: InterleavedRows(tensor, hf_config.head_dim) if _ROTATED.search(name) else tensor
        for name, tensor in weights.items()
    }


def name_of(name: str) -> str:
    """Transformers' name of a tensor; an unknown name stays as it is."""
    module, _, suffix = name.rpartition(".")
    found = NAMES.get(module)
    layer = _LAYER.fullmatch(module)
    if layer is not None:
        number, path = layer.groups()
        inner = LAYER_NAMES.get(path)
        if inner is None and path.startswith(("feed_forward.experts.", "feed_forward.gate")):
            inner = path.replace(*_EXPERTS, 1)
        found = inner and f"model.layers.{number}.{inner}"
    return f"{found}.{SUFFIXES.get(suffix, suffix)}" if found else name
