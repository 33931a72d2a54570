"""A tiny model with images in Mistral's own format, and its forward pass written after Mistral's own code.

Rotary embeddings are complex numbers that turn neighboring elements of a head: in the tower the first half of them by
the row of a patch, the second half by its column.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

IMAGE, BREAK, END = 10, 12, 13
PARAMS: dict[str, Any] = {
    "dim": 32, "n_layers": 2, "head_dim": 8, "hidden_dim": 48, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5,
    "vocab_size": 64, "rope_theta": 1e4, "max_seq_len": 256,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 24, "num_channels": 3, "image_size": 32, "patch_size": 4, "rope_theta": 1e3, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 2, "image_token_id": IMAGE, "image_break_token_id": BREAK,
    "image_end_token_id": END,
}  # fmt: skip
MERGING = {
    "adapter_bias": False, "mm_projector_id": "patch_merge", "spatial_merge_size": 2,
    "add_pre_mm_projector_layer_norm": True,
}  # fmt: skip


def write_model(folder: Path, **more: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write params.json and consolidated.safetensors; returns both. `more`: of vision_encoder."""
    params = {**PARAMS, "vision_encoder": {**VISION, **more}}
    tensors = random_tensors(params)
    (folder / "params.json").write_text(json.dumps(params))
    save_file(tensors, folder / "consolidated.safetensors")
    return params, tensors


def random_tensors(params: dict[str, Any]) -> dict[str, Tensor]:
    vision = params["vision_encoder"]
    dim, width, merge = params["dim"], vision["hidden_size"], vision.get("spatial_merge_size", 1)
    patch = vision["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (params["vocab_size"], dim),
        "norm.weight": (dim,),
        "output.weight": (params["vocab_size"], dim),
        "vision_encoder.patch_conv.weight": (width, 3, patch, patch),
        "vision_encoder.ln_pre.weight": (width,),
        "vision_language_adapter.w_in.weight": (dim, width),
        "vision_language_adapter.w_out.weight": (dim, dim),
    }
    heads, kv_heads = params["n_heads"] * params["head_dim"], params["n_kv_heads"] * params["head_dim"]
    for layer in range(params["n_layers"]):
        shapes |= _layer_shapes(f"layers.{layer}", dim, heads, kv_heads, params["hidden_dim"])
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"vision_encoder.transformer.layers.{layer}"
        shapes |= _layer_shapes(prefix, width, width, width, vision["intermediate_size"])
    if vision.get("adapter_bias", True):
        shapes |= {f"vision_language_adapter.{name}.bias": (dim,) for name in ("w_in", "w_out")}
    if vision.get("mm_projector_id"):
        shapes |= {
            "pre_mm_projector_norm.weight": (width,),
            "patch_merger.merging_layer.weight": (width, width * merge * merge),
        }
    torch.manual_seed(3)
    return {
        name: 1 + 0.1 * torch.randn(shape) if "norm" in name or "ln_pre" in name else 0.3 * torch.randn(shape)
        for name, shape in shapes.items()
    }


def _layer_shapes(prefix: str, dim: int, heads: int, kv_heads: int, hidden: int) -> dict[str, tuple[int, ...]]:
    own = {
        "attention.wq": (heads, dim), "attention.wk": (kv_heads, dim), "attention.wv": (kv_heads, dim),
        "attention.wo": (dim, heads), "attention_norm": (dim,), "ffn_norm": (dim,), "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden), "feed_forward.w3": (hidden, dim),
    }  # fmt: skip
    return {f"{prefix}.{name}.weight": shape for name, shape in own.items()}


def logits_of(params: dict[str, Any], tensors: dict[str, Tensor], tokens: list[int], images: list[Tensor]) -> Tensor:
    """Logits at each position. `images`: float32[3, height, width] for the image tokens, in order."""
    hidden = tensors["tok_embeddings.weight"][tokens]
    if images:
        hidden[torch.tensor(tokens) == IMAGE] = torch.cat([encode_image(params, tensors, one) for one in images])
    dim, eps = params["head_dim"], params["norm_eps"]
    turns = torch.outer(torch.arange(len(tokens)).float(), frequencies(dim, params["rope_theta"]))
    causal = torch.ones(len(tokens), len(tokens)).tril().bool()
    for layer in range(params["n_layers"]):
        weights = _part(tensors, f"layers.{layer}.")
        hidden = _layer(hidden, weights, turns, causal, dim, eps)
    return _rms_norm(hidden, tensors["norm.weight"], eps) @ tensors["output.weight"].T


def encode_image(params: dict[str, Any], tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The embeddings of an image, by rows."""
    vision = params["vision_encoder"]
    grid = functional.conv2d(pixels[None], tensors["vision_encoder.patch_conv.weight"], stride=vision["patch_size"])[0]
    width, rows, columns = grid.shape
    hidden = _rms_norm(grid.flatten(1).T, tensors["vision_encoder.ln_pre.weight"], 1e-5)
    dim = width // vision["num_attention_heads"]
    inverse = frequencies(dim, vision["rope_theta"])
    by_row = torch.outer(torch.arange(rows).float(), inverse[::2])[:, None].expand(-1, columns, -1)
    by_column = torch.outer(torch.arange(columns).float(), inverse[1::2])[None].expand(rows, -1, -1)
    turns = torch.cat([by_row, by_column], -1).flatten(0, 1)
    everywhere = torch.ones(len(hidden), len(hidden)).bool()
    for layer in range(vision["num_hidden_layers"]):
        weights = _part(tensors, f"vision_encoder.transformer.layers.{layer}.")
        hidden = _layer(hidden, weights, turns, everywhere, dim, 1e-5)
    if "patch_merger.merging_layer.weight" in tensors:
        merge = vision["spatial_merge_size"]
        hidden = _rms_norm(hidden, tensors["pre_mm_projector_norm.weight"], params["norm_eps"])
        squares = hidden.view(rows // merge, merge, columns // merge, merge, width).permute(0, 2, 4, 1, 3)
        hidden = squares.reshape(-1, width * merge * merge) @ tensors["patch_merger.merging_layer.weight"].T
    adapter = _part(tensors, "vision_language_adapter.")
    hidden = functional.gelu(functional.linear(hidden, adapter["w_in.weight"], adapter.get("w_in.bias")))
    return functional.linear(hidden, adapter["w_out.weight"], adapter.get("w_out.bias"))


def frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)


def _layer(hidden: Tensor, weights: dict[str, Tensor], turns: Tensor, mask: Tensor, dim: int, eps: float) -> Tensor:
    at = _rms_norm(hidden, weights["attention_norm.weight"], eps)
    q, k, v = ((at @ weights[f"attention.w{one}.weight"].T).unflatten(-1, (-1, dim)) for one in "qkv")
    q, k = _rotated(q, turns), _rotated(k, turns)
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
    shares = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    mixed = torch.einsum("hqk,khd->qhd", shares, v).flatten(1)
    hidden = hidden + mixed @ weights["attention.wo.weight"].T
    at = _rms_norm(hidden, weights["ffn_norm.weight"], eps)
    gate, up = (at @ weights[f"feed_forward.{one}.weight"].T for one in ("w1", "w3"))
    return hidden + (functional.silu(gate) * up) @ weights["feed_forward.w2.weight"].T


def _rotated(heads: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)[:, None]).flatten(-2)


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * weight


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
