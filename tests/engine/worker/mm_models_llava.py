"""LLaVA 1.5: CLIP and Llama."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.multimodal.types import Processed
from tests.engine.worker.mm_model import TEXT, MMModel, save

IMAGE = 100
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
    "initializer_factor": 4.0,
}


def build_llava(folder: Path) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(7)
    config = LlavaConfig(vision_config=CLIP, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE)
    return save(LlavaForConditionalGeneration._from_config(config, dtype=torch.float32), folder, (IMAGE,))


def pixels(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    del ids
    if not processed:
        return {}
    return {"pixel_values": torch.from_numpy(np.concatenate([one.tensors["pixel_values"] for one in processed]))}


MODELS = {"llava": MMModel(build_llava, pixels)}
