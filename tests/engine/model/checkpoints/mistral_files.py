"""Tiny models in Mistral's own format: params.json, consolidated.safetensors and tekken.json."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.worker.driver import build_model

PARTS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "block_sparse_moe.gate": "feed_forward.gate",
    "block_sparse_moe.experts": "feed_forward.experts",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}
SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[TOOL_CONTENT]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]",
)  # fmt: skip
ROOM = 20  # for special tokens, which come first
WORDS = ("th", "the", " the", "in", " f", "ox", " fox", "qu", "ick", " quick", "ing", " lazy", "日", "本", "é", "\n\n")
TEKKEN_SIZE = ROOM + 256 + len(WORDS)


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a head in Mistral's order: the two rows that are rotated together are neighbors."""
    out = torch.empty_like(weight)
    for row in range(len(weight)):
        head, at = divmod(row, head_dim)
        half, i = divmod(at, head_dim // 2)
        out[head * head_dim + 2 * i + half] = weight[row]
    return out


def mistral_name(name: str) -> str:
    name = name.removeprefix("model.") if name.startswith("model.layers") else name
    for ours, own in PARTS.items():
        name = name.replace(ours, own)
    return name


def mistral_tensors(folder: Path, head_dim: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint that transformers wrote, in Mistral's format."""
    return {
        mistral_name(name): interleaved(value, head_dim) if "q_proj" in name or "k_proj" in name else value
        for name, value in load_file(folder / "model.safetensors").items()
    }


def params_of(config: Any, **more: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_seq_len": config.max_position_embeddings,
    }
    return params | more


def build_mistral(kind: str, folder: Path, params: dict[str, Any] | None = None, **more: object) -> Any:
    """Write a tiny model in Mistral's format; returns it as transformers' class. `params` change params.json."""
    model: Any = build_model(kind, folder, **more)
    (folder / "config.json").unlink()
    whole = params_of(model.config, **(params or {}))
    (folder / "params.json").write_text(json.dumps(whole))
    save_file(mistral_tensors(folder, whole["head_dim"]), folder / "consolidated.safetensors")
    (folder / "model.safetensors").unlink()
    return model


def write_tekken(folder: Path, special: Sequence[str] = SPECIAL, **more: Any) -> None:
    """Write a tekken.json with the bytes and a few words; `more` are settings of images or audio."""
    pieces = [*(bytes([byte]) for byte in range(256)), *(word.encode() for word in WORDS)]
    vocabulary = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    named = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(special)]
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
        "num_vocab_tokens": len(vocabulary),
        "default_vocab_size": TEKKEN_SIZE,
        "default_num_special_tokens": ROOM,
        "version": "v7",
    }
    whole = {"config": config, "vocab": vocabulary, "special_tokens": named, **more}
    (folder / "tekken.json").write_text(json.dumps(whole))
