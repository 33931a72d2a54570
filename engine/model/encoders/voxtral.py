"""The encoder of Voxtral."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' VoxtralForConditionalGeneration."""
    return VoxtralEncoder(model)


class VoxtralEncoder:
    """One embedding for eight frames of a sound.

    The input has input_features: float32[chunks, bands, frames]. Chunks are encoded one by one: they don't depend on
    each other, and a long sound needs no more memory than a short one.
    """

    def __init__(self, model: Any):
        self._model: Any = model.model

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        chunks = tensors["input_features"].split(1)
        found = [self._model.get_audio_features(chunk, return_dict=True).pooler_output for chunk in chunks]
        return EncodedInput(torch.cat(found))
