"""The encoder of Qwen3-VL: features of some of its layers go to the decoder's first layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' Qwen3VLForConditionalGeneration or Qwen3VLMoeForConditionalGeneration."""
    return Qwen3VLEncoder(model)


class Qwen3VLEncoder:
    """One embedding for each square of merged patches, by frames, rows and columns; see `Qwen2VLEncoder`."""

    def __init__(self, model: Any):
        self._tower: Any = model.model.visual

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image or video."""
        pixels = tensors["pixel_values"].to(self._tower.dtype)
        found = self._tower(pixels, grid_thw=tensors["grid_thw"], return_dict=True)
        return EncodedInput(found.pooler_output, torch.stack(list(found.deepstack_features)))
