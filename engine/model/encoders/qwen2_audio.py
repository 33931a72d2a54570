"""The encoder of Qwen2-Audio."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' Qwen2AudioForConditionalGeneration."""
    return Qwen2AudioEncoder(model)


class Qwen2AudioEncoder:
    """One embedding for four frames of a sound.

    The input has input_features: float32[bands, frames], padded to the length of the tower, and frames: int64[1], how
    many of them the sound has. Queries see the positions of the sound, not the padding.
    """

    def __init__(self, model: Any):
        self._tower: Any = model.model.audio_tower
        self._projector: Any = model.model.multi_modal_projector

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        features = tensors["input_features"][None]
        positions, count = self._tower._get_feat_extract_output_lengths(int(tensors["frames"][0]))
        total = self._tower.config.max_source_positions
        visible = (torch.arange(total, device=features.device) < positions).expand(1, 1, total, total)
        found = self._tower(features, attention_mask=visible).last_hidden_state
        return EncodedInput(self._projector(found[0, :count]))
