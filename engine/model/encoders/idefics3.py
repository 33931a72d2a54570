"""The encoder of Idefics3 and SmolVLM: tiles of one size, whose patches are joined by squares in the connector."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder
from engine.multimodal.families import FRAMES_AT_ONCE


def make(model: Any) -> Encoder:
    """`model` is transformers' Idefics3ForConditionalGeneration or SmolVLMForConditionalGeneration."""
    return Idefics3Encoder(model)


class Idefics3Encoder:
    """The embeddings of the tiles by rows of the image, then those of the whole image.

    The input has pixel_values: float32[tiles + 1, channels, size, size]. Calls the tower and the connector themselves,
    since `get_image_features` drops tiles whose values are all 0 as padding.
    """

    def __init__(self, model: Any):
        self._tower: Any = model.model.vision_model
        self._connector: Any = model.model.connector
        self._patch: int = model.config.vision_config.patch_size

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image, all tiles in one batch; or some frames of a video after the other."""
        if "pixel_values_videos" in tensors:
            frames = tensors["pixel_values_videos"].split(FRAMES_AT_ONCE)
            return EncodedInput(torch.cat([self._features(some) for some in frames]))
        return EncodedInput(self._features(tensors["pixel_values"]))

    def _features(self, tiles: Tensor) -> Tensor:
        pixels = tiles.to(self._tower.dtype)
        count, _, height, width = pixels.shape
        whole = torch.ones((count, height // self._patch, width // self._patch), dtype=torch.bool, device=pixels.device)
        hidden = self._tower(pixel_values=pixels, patch_attention_mask=whole, return_dict=True).last_hidden_state
        features: Tensor = self._connector(hidden).flatten(0, 1)
        return features
