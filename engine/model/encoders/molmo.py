"""The encoder of Molmo's first generation."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is a MolmoForConditionalGeneration."""
    return MolmoEncoder(model)


class MolmoEncoder:
    """What is added to the embeddings of an image's patch tokens; the input is as in `get_image_features`."""

    def __init__(self, model: Any):
        self._model: Any = model.model

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        found = self._model.get_image_features(tensors["images"], tensors["image_masks"], tensors["image_order"])
        return EncodedInput(found)
