"""The encoder of InternVL: tiles of one size, whose patches are joined by squares before the projector."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder
from engine.multimodal.families import FRAMES_AT_ONCE


def make(model: Any) -> Encoder:
    """`model` is transformers' InternVLForConditionalGeneration."""
    return InternVLEncoder(model)


class InternVLEncoder:
    """The embeddings of the tiles by rows of the image, then those of the whole image.

    The input has pixel_values: float32[tiles + 1, channels, size, size]; one tile stands for the whole image.
    A video has pixel_values_videos: float32[frames, channels, size, size].
    """

    def __init__(self, model: Any):
        config = model.config
        self._model: Any = model.model
        self._layer: int | list[int] = config.vision_feature_layer
        self._strategy: str = config.vision_feature_select_strategy

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image, all tiles in one batch; or some frames of a video after the other."""
        if "pixel_values_videos" in tensors:
            frames = tensors["pixel_values_videos"].split(FRAMES_AT_ONCE)
            return EncodedInput(torch.cat([self._features(some) for some in frames]))
        return EncodedInput(self._features(tensors["pixel_values"]))

    def _features(self, tiles: Tensor) -> Tensor:
        found = self._model.get_image_features(
            pixel_values=tiles,
            vision_feature_layer=self._layer,
            vision_feature_select_strategy=self._strategy,
            return_dict=True,
        )
        features: Tensor = found.pooler_output.flatten(0, 1)
        return features
