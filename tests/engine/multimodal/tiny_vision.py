"""Configurations and tokenizers of models that take images, small enough to compute with random weights in no time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VOCABULARY = 320
FIRST_SPECIAL = 256  # the ids below are bytes
SPECIAL_TOKENS: dict[str, Sequence[str]] = {
    "qwen": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "gemma3": ("<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    "internvl": ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    "idefics3": (
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    ),
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN_IDS = {"image_token_id": 256, "video_token_id": 257, "vision_start_token_id": 258, "vision_end_token_id": 259}
PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
TILE = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LAYERS = ["sliding_attention", "full_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        **QWEN_IDS,
        "text_config": {**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": MROPE},
        "vision_config": {**PATCHES, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **QWEN_IDS,
        "text_config": {**TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
        "vision_config": {
            **PATCHES,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    },
    "qwen3_vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        **QWEN_IDS,
        "text_config": {
            **TEXT,
            "model_type": "qwen3_vl_text",
            "head_dim": 8,
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        "vision_config": {
            **PATCHES,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    },
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 256,
        "image_token_index": 257,
        "eoi_token_index": 258,
        "mm_tokens_per_image": 4,
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": LAYERS,
            "query_pre_attn_scalar": 8,
        },
        "vision_config": {**TILE, "model_type": "siglip_vision_model", "hidden_size": 32, "vision_use_head": False},
    },
    "internvl": {
        "architectures": ["InternVLForConditionalGeneration"],
        "image_token_id": 258,
        "image_seq_length": 4,
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**TILE, "image_size": [16, 16], "patch_size": [4, 4], "hidden_size": 32},
    },
    "idefics3": {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "image_token_id": 256,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**TILE, "hidden_size": 32},
    },
    "smolvlm": {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "image_token_id": 256,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**TILE, "hidden_size": 32},
    },
}


def tokens_of(model_type: str) -> Sequence[str]:
    """The special tokens of a model, which follow the bytes."""
    if model_type.startswith("qwen"):
        return SPECIAL_TOKENS["qwen"]
    return SPECIAL_TOKENS["idefics3" if model_type == "smolvlm" else model_type]


def hf_config(model_type: str) -> Any:
    """transformers' config of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **CONFIGS[model_type])


def tiny_model(model_type: str) -> Any:
    """transformers' class with random weights, in float32."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = hf_config(model_type)
    model = getattr(transformers, config.architectures[0])(config).float().eval()
    for parameter in model.parameters():
        if not parameter.any():  # Gemma 3's projection starts as zeros, with which all images would be equal
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def write_tokenizer(folder: Path, special: Sequence[str], merges: Sequence[tuple[str, str]] = ()) -> None:
    """A tokenizer.json of bytes, of merged pairs, and of special tokens from FIRST_SPECIAL on if nothing is merged."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    model = models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=list(merges))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, model_type: str, **options: Any) -> Path:
    """A folder with the tokenizer of a tiny model, and a preprocessor_config.json with `options` if there are any."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **CONFIGS[model_type]}))
    write_tokenizer(folder, tokens_of(model_type))
    if options:
        (folder / "preprocessor_config.json").write_text(json.dumps(options))
    return folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A random image."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
