"""The encoder of Mistral3 (a Pixtral tower, and a projector that merges neighboring patches)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' Mistral3ForConditionalGeneration."""
    return Mistral3Encoder(model)


class Mistral3Encoder:
    """One embedding for each square of spatial_merge_size x spatial_merge_size patches, by rows.

    The input has pixel_values: float32[1, channels, height, width].
    """

    def __init__(self, model: Any):
        self._model: Any = model.model
        self._layer: int | list[int] = model.config.vision_feature_layer
        self._edge: int = model.config.vision_config.patch_size * model.config.spatial_merge_size

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image."""
        pixels = tensors["pixel_values"]
        height, width = pixels.shape[-2:]
        if height * width == self._edge * self._edge:
            pixels = pixels.repeat(2, 1, 1, 1)  # transformers' class drops a dimension of length one
        found = self._model.get_image_features(
            pixel_values=pixels,
            image_sizes=[(height, width)] * len(pixels),
            vision_feature_layer=self._layer,
            return_dict=True,
        )
        return EncodedInput(found.pooler_output[0])
