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
NAMES = {"tok_embeddings": "embed_tokens", "norm": "norm"}  # of the decoder
OUTPUT, HEAD = "output", "lm_head"
VISION_LAYER_NAMES = {
    "attention_norm": "attention_norm",
    "attention.wq": "attention.q_proj",
    "attention.wk": "attention.k_proj",
    "attention.wv": "attention.v_proj",
    "attention.wo": "attention.o_proj",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "feed_forward.w3": "feed_forward.up_proj",
}
TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
VISION_NAMES = {
    "vision_encoder.patch_conv": f"{TOWER}.patch_conv",
    "vision_encoder.ln_pre": f"{TOWER}.ln_pre",
    "vision_language_adapter.w_in": f"{PROJECTOR}.linear_1",
    "vision_language_adapter.w_out": f"{PROJECTOR}.linear_2",
    "pre_mm_projector_norm": f"{PROJECTOR}.norm",
    "patch_merger.merging_layer": f"{PROJECTOR}.patch_merger.merging_layer",
}
SUFFIXES = {"qscale_weight": "weight_scale"}
ACTIVATION_SCALE = ".qscale_act"  # not used: activations are not quantized to eight bits here
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_VISION_LAYER = re.compile(r"vision_encoder\.transformer\.layers\.(\d+)\.(.+)")
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
    """Present the tensors of a Mistral checkpoint under transformers' names, in its order of rows.

    In a model that takes images the decoder is a part of the class, and its names begin with the part's.
    """
    vision = getattr(hf_config, "vision_config", None)
    decoder = "model" if vision is None else "model.language_model"
    renamed = {name_of(name, decoder): tensor for name, tensor in stored.items() if not name.endswith(ACTIVATION_SCALE)}
    weights = merge_quantized(renamed, quantization_config(hf_config))
    text = hf_config if vision is None else hf_config.text_config

    def in_order(name: str, tensor: StoredTensor | QuantizedWeight) -> CheckpointTensor:
        if not _ROTATED.search(name):
            return tensor
        return InterleavedRows(
            tensor, vision.head_dim if name.startswith(TOWER) and vision is not None else text.head_dim
        )

    return {name: in_order(name, tensor) for name, tensor in weights.items()}


def name_of(name: str, decoder: str = "model") -> str:
    """Transformers' name of a tensor; an unknown name stays as it is. `decoder` is the path of the decoder."""
    module, _, suffix = name.rpartition(".")
    found = HEAD if module == OUTPUT else VISION_NAMES.get(module)
    if module in NAMES:
        found = f"{decoder}.{NAMES[module]}"
    layer, vision_layer = _LAYER.fullmatch(module), _VISION_LAYER.fullmatch(module)
    if vision_layer is not None:
        number, path = vision_layer.groups()
        inner = VISION_LAYER_NAMES.get(path)
        found = inner and f"{TOWER}.transformer.layers.{number}.{inner}"
    elif layer is not None:
        number, path = layer.groups()
        inner = LAYER_NAMES.get(path)
        if inner is None and path.startswith(("feed_forward.experts.", "feed_forward.gate")):
            inner = path.replace(*_EXPERTS, 1)
        found = inner and f"{decoder}.layers.{number}.{inner}"
    return f"{found}.{SUFFIXES.get(suffix, suffix)}" if found else name
