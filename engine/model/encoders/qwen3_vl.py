"""The encoder of Qwen3-VL: features of some of its layers go to the decoder's first layers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder
from engine.model.encoders.qwen2_vl import encode_frames


def make(model: Any) -> Encoder:
    """`model` is transformers' Qwen3VLForConditionalGeneration or Qwen3VLMoeForConditionalGeneration."""
    return Qwen3VLEncoder(model)


class Qwen3VLEncoder:
    """One embedding for each square of merged patches, by frames, rows and columns; see `Qwen2VLEncoder`."""

    def __init__(self, model: Any):
        self._tower: Any = model.model.visual

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image or video."""
        parts = list(encode_frames(self._tower, tensors))
        deepstack = [torch.stack(list(part.deepstack_features)) for part in parts]
        return EncodedInput(torch.cat([part.pooler_output for part in parts]), torch.cat(deepstack, 1))
