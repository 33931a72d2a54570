"""The encoder of Gemma 3: as many embeddings for each image or crop, whatever its size was."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' Gemma3ForConditionalGeneration."""
    return Gemma3Encoder(model)


class Gemma3Encoder:
    """The embeddings of the image, then those of its crops.

    The input has pixel_values: float32[1 + crops, channels, size, size].
    """

    def __init__(self, model: Any):
        self._model: Any = model.model
        self._dtype = model.model.vision_tower.dtype

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image and its crops."""
        found = self._model.get_image_features(tensors["pixel_values"].to(self._dtype), return_dict=True)
        return EncodedInput(found.pooler_output.flatten(0, 1))
