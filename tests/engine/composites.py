"""Tiny models with encoders and random weights, for tests of their decoders."""

from typing import Any

import torch

VOCAB = 128
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {**TOWER, "image_size": 28, "patch_size": 14}
QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 14}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
# By model type: transformers' class, the text config's own fields, and the vision config.
COMPOSITES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llava": ("LlavaForConditionalGeneration", {"model_type": "llama"}, {**CLIP, "model_type": "clip_vision_model"}),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        {**CLIP, "model_type": "pixtral", "head_dim": 8},
    ),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        {"model_type": "qwen2"},
        {**CLIP, "model_type": "siglip_vision_model"},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {"model_type": "qwen3", "head_dim": 16},
        {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
    ),
    "smolvlm": ("SmolVLMForConditionalGeneration", {"model_type": "llama"}, CLIP),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {"rope_parameters": MROPE},
        {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 64, "mlp_ratio": 1},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"rope_parameters": MROPE},
        {**QWEN_TOWER, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 16},
        {
            **QWEN_TOWER, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 64,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
    ),
}  # fmt: skip


def build_composite(kind: str, dtype: torch.dtype = torch.float32, **text: Any) -> Any:
    """A tiny model of that kind; `text`: fields of its text config."""
    import transformers

    name, own, vision = COMPOSITES[kind]
    config = transformers.AutoConfig.for_model(kind, text_config={**TEXT, **own, **text}, vision_config=dict(vision))
    torch.manual_seed(7)
    model = getattr(transformers, name)._from_config(config, dtype=dtype)
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim == 1:  # biases begin as zeros, norms as ones: neither would show a mistake
                values += 0.1 * torch.randn_like(values)
    return model.eval().requires_grad_(False)
