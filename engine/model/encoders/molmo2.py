"""The encoder of Molmo 2."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' Molmo2ForConditionalGeneration."""
    return Molmo2Encoder(model)


class Molmo2Encoder:
    """What is added to the embeddings of an image's patch tokens.

    The input has pixel_values: float32[crops, patches, pixels of a patch]; image_token_pooling: int64[n, patches],
    those that become one embedding; image_grids: int64[1, 4].
    """

    def __init__(self, model: Any):
        self._model: Any = model.model

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        found = self._model.get_image_features(
            pixel_values=tensors["pixel_values"],
            image_token_pooling=tensors["image_token_pooling"],
            image_grids=tensors["image_grids"],
            return_dict=True,
        )
        return EncodedInput(found.pooler_output[0])
