"""The encoder of LLaVA 1.5, and of Pixtral in the same layout (vision_tower, multi_modal_projector, language_model)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' LlavaForConditionalGeneration."""
    return LlavaEncoder(model)


class LlavaEncoder:
    """One embedding for each patch of an image, by rows.

    The input has pixel_values: float32[1, channels, height, width].
    """

    def __init__(self, model: Any):
        config = model.config
        self._model: Any = model.model
        self._layer: int | list[int] = config.vision_feature_layer
        self._strategy: str = config.vision_feature_select_strategy

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image; the sizes that a Pixtral tower asks for are those of `pixel_values`."""
        found = self._model.get_image_features(
            pixel_values=tensors["pixel_values"],
            vision_feature_layer=self._layer,
            vision_feature_select_strategy=self._strategy,
            return_dict=True,
        )
        return EncodedInput(found.pooler_output[0])
