"""LLaVA-NeXT and LLaVA-OneVision: images in tiles."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.multimodal.types import Processed, Video
from tests.engine.worker.mm_model import TEXT, MMModel, save
from tests.engine.worker.mm_models_llava import CLIP as SMALLER_PATCHES
from tests.engine.worker.mm_models_llava import IMAGE

CLIP = {**SMALLER_PATCHES, "patch_size": 14}  # fewer tokens
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
GRID = [[28, 56], [56, 28], [56, 56]]


def build_llava_next(folder: Path) -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    torch.manual_seed(7)
    text = {"model_type": "mistral", "sliding_window": None, **TEXT}
    config = LlavaNextConfig(vision_config=CLIP, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=GRID)
    return save(LlavaNextForConditionalGeneration._from_config(config, dtype=torch.float32), folder, (IMAGE,))


def build_llava_onevision(folder: Path) -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    torch.manual_seed(7)
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config={"model_type": "qwen2", **TEXT}, image_token_index=IMAGE,
        video_token_index=IMAGE + 1, image_grid_pinpoints=GRID, vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration._from_config(config, dtype=torch.float32)
    with torch.no_grad():  # SigLIP's features are small
        model.model.multi_modal_projector.linear_2.weight *= 20
    return save(model, folder, (IMAGE, IMAGE + 1))


def tiles(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    """The tiles of the images, padded to the most of them; transformers' classes drop the padding."""
    del ids
    if not processed:
        return {}
    if "pixel_values_videos" in processed[0].tensors:
        videos = np.stack([one.tensors["pixel_values_videos"] for one in processed])
        return {"pixel_values_videos": torch.from_numpy(videos)}
    pixels = [one.tensors["pixel_values"][0] for one in processed]
    most = max(len(one) for one in pixels)
    padded = np.stack([np.pad(one, [(0, most - len(one)), (0, 0), (0, 0), (0, 0)]) for one in pixels])
    sizes = np.concatenate([one.tensors["image_sizes"] for one in processed])
    return {"pixel_values": torch.from_numpy(padded), "image_sizes": torch.from_numpy(sizes)}


def tiles_of_one_image(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    """As `tiles`; several images in a prompt have none."""
    found = tiles(ids, processed)
    return found | {"batch_num_images": torch.tensor([len(processed)])} if "image_sizes" in found else found


def wide(number: int) -> Image.Image:
    """Pictures of two shapes, with padding in their tiles."""
    noise = np.random.default_rng(number)
    return Image.fromarray(noise.integers(0, 256, (20, 56 - 12 * (number == 0), 3), dtype=np.uint8))


def clip(number: int) -> Video:
    """3 frames of noise in two shapes."""
    noise = np.random.default_rng(number)
    return Video(noise.integers(0, 256, (3, 20, 56 - 12 * (number == 0), 3), dtype=np.uint8), np.arange(3) * 0.5)


MODELS = {
    "llava_next": MMModel(build_llava_next, tiles, wide),
    "llava_onevision": MMModel(build_llava_onevision, tiles_of_one_image, wide),
    "llava_onevision/video": MMModel(build_llava_onevision, tiles_of_one_image, clip, "video"),
}
