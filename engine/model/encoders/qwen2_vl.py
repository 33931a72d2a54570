"""The encoder of Qwen2-VL and Qwen2.5-VL: images and videos of any size in patches, which are merged by squares."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder
from engine.multimodal.families import PATCHES_AT_ONCE


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
        return EncodedInput(torch.cat([part.pooler_output for part in encode_frames(self._tower, tensors)]))


def encode_frames(tower: Any, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The tower's outputs for some frames after the other, so that a long video needs no more memory than a short one.

    Patches attend only to those of their frame, so the parts are those of the whole video.
    """
    pixels, grid = tensors["pixel_values"].to(tower.dtype), tensors["grid_thw"]
    frames, rows, columns = grid[0].tolist()
    at_once = max(1, PATCHES_AT_ONCE // (rows * columns))
    for first in range(0, frames, at_once):
        some = min(at_once, frames - first)
        part = pixels[first * rows * columns : (first + some) * rows * columns]
        yield tower(part, grid_thw=grid.new_tensor([[some, rows, columns]]), return_dict=True)
