"""Configs of tiny LLaVA, Pixtral and Mistral3 models, and pictures of noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGE = 5  # the id of the placeholder token
TEXT = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 64, "patch_size": 4, "hidden_act": "silu",
}  # fmt: skip
FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
NEXT_GRID = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
ONEVISION_GRID = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
ODD_SIZES = [(1, 1), (50, 40), (1, 60), (60, 1), (1, 1000), (1000, 1), (30, 400), (512, 300)]  # width, height


def config_of(kind: str, **more: Any) -> Any:
    """The config of a tiny model of a kind."""
    from transformers import AutoConfig

    model_type, fields = {
        "llava": ("llava", {"vision_config": CLIP}),
        "llava-siglip": ("llava", {"vision_config": SIGLIP, **FULL}),
        "pixtral": ("llava", {"vision_config": PIXTRAL, **FULL}),
        "llava_next": ("llava_next", {"vision_config": CLIP, "image_grid_pinpoints": NEXT_GRID}),
        "llava_onevision": (
            "llava_onevision",
            {"vision_config": SIGLIP, "image_grid_pinpoints": ONEVISION_GRID, "vision_aspect_ratio": "anyres_max_4"},
        ),
        "mistral3": ("mistral3", {"vision_config": PIXTRAL, "tie_word_embeddings": False}),
    }[kind]
    return AutoConfig.for_model(model_type, **{"text_config": TEXT, "image_token_index": IMAGE, **fields, **more})


def model_of(kind: str, **more: Any) -> Any:
    """A tiny model of a kind with random float32 weights, biases and norms included."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(7)
    model: Any = AutoModelForImageTextToText.from_config(config_of(kind, **more), dtype=torch.float32)
    with torch.no_grad():
        for values in model.parameters():
            values += 0.1 * torch.randn_like(values)
    return model.eval()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of noise, in RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def write_options(folder: Path, **fields: Any) -> None:
    """Write preprocessor_config.json."""
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


def tokenizer() -> Any:
    """A tokenizer with `<image>` as the placeholder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "a", "b", "c", "d", "<image>", "[IMG_BREAK]", "[IMG_END]"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>", additional_special_tokens=words[5:]
    )
