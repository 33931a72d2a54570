"""The encoder of Qwen2-VL and Qwen2.5-VL: images and videos of any size in patches, which are merged by squares."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' Qwen2VLForConditionalGeneration or Qwen2_5_VLForConditionalGeneration."""
    return Qwen2VLEncoder(model)


class Qwen2VLEncoder:
    """One embedding for each square of merged patches, by frames, rows and columns.

    The input has pixel_values: float32[patches, values of a patch in all its frames], and grid_thw: int64[1, 3],
    frames, rows and columns of patches.
    """

    def __init__(self, model: Any):
        self._tower: Any = model.model.visual

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image or video."""
        pixels = tensors["pixel_values"].to(self._tower.dtype)
        return EncodedInput(self._tower(pixels, grid_thw=tensors["grid_thw"], return_dict=True).pooler_output)
