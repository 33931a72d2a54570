"""The encoder of Molmo 2."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder
from engine.multimodal.families import FRAMES_AT_ONCE


def make(model: Any) -> Encoder:
    """`model` is transformers' Molmo2ForConditionalGeneration."""
    return Molmo2Encoder(model)


class Molmo2Encoder:
    """What is added to the embeddings of an image's patch tokens.

    The input has pixel_values: float32[crops, patches, pixels of a patch]; image_token_pooling: int64[n, patches],
    those that become one embedding; image_grids: int64[1, 4], rows and columns of the whole image and of its crops. A
    video is like an image without crops: those of its frames are one below the other.
    """

    def __init__(self, model: Any):
        self._model: Any = model.model

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        pixels, pooling, grids = (tensors[name] for name in ("pixel_values", "image_token_pooling", "image_grids"))
        if grids[0, 2]:
            return EncodedInput(self._features(pixels, pooling, grids))
        # Some frames after the other, so that a long video needs no more memory than a short one.
        frames, per_frame = len(pixels), len(pooling) // len(pixels)
        parts = []
        for first in range(0, frames, FRAMES_AT_ONCE):
            some = pixels[first : first + FRAMES_AT_ONCE]
            own = pooling[first * per_frame : (first + len(some)) * per_frame]
            own = torch.where(own < 0, own, own - first * pixels.shape[1])
            parts.append(self._features(some, own, grids.new_tensor([[len(own), 1, 0, 0]])))
        return EncodedInput(torch.cat(parts))

    def _features(self, pixels: Tensor, pooling: Tensor, grids: Tensor) -> Tensor:
        found = self._model.get_image_features(
            pixel_values=pixels, image_token_pooling=pooling, image_grids=grids, return_dict=True
        )
        features: Tensor = found.pooler_output[0]
        return features
