"""Writes what ships of `smollm2-135m-vision`: tower, connector and the files that make a LLaVA checkpoint of them.

`engine/model/vision_model.py` puts them together with the text model.
"""

import json
from pathlib import Path
from typing import Any

import torch

from training.tower import LAYER, TOWER, Tower

PLACEHOLDER_ID = 16
"""Of a special token of SmolLM2 that its chats never use (`<empty_output>`), so that the vocabulary does not grow."""
DTYPE = torch.bfloat16


def write_checkpoint(tower: Tower, text_model: Path, out: Path) -> None:
    """Write tower, connector, config and image processor into `out`, which may hold older ones.

    Args:
        text_model: the folder of the text model.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    parts = (("vision_tower.vision_model", tower.tower), ("multi_modal_projector", tower.connector))
    tensors = {f"{prefix}.{name}": value for prefix, part in parts for name, value in part.state_dict().items()}
    tensors = {name: value.detach().to(DTYPE).contiguous() for name, value in tensors.items()}
    save_file(tensors, out / "vision.safetensors", metadata={"format": "pt"})
    text_config = json.loads((text_model / "config.json").read_text())
    for name, content in (("config.json", config(text_config)), ("preprocessor_config.json", image_processor())):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def config(text_config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of LLaVA, with that of the text model."""
    side = TOWER["image_size"] // TOWER["patch_size"]
    dropped = ("_model_name_or_path", "architectures", "dtype", "transformers_version")
    kept = {name: value for name, value in text_config.items() if name not in dropped}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": text_config["dtype"],
        "image_seq_length": side * side,
        "image_token_index": PLACEHOLDER_ID,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": kept,
        "tie_word_embeddings": text_config.get("tie_word_embeddings", False),
        "vision_config": TOWER,
        "vision_feature_layer": LAYER,
        "vision_feature_select_strategy": "default",
    }


def image_processor() -> dict[str, Any]:
    """The preprocessor_config.json: the shorter side becomes 64 pixels, the middle is kept, values are -1 to 1."""
    size = TOWER["image_size"]
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }
