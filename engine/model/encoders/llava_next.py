"""The encoder of LLaVA-NeXT: the whole image and its tiles in one batch, with an embedding at the end of each row."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' LlavaNextForConditionalGeneration."""
    return LlavaNextEncoder(model)


class LlavaNextEncoder:
    """The embeddings of the whole image, then those of its tiles by rows of the image, without padding.

    The input has pixel_values: float32[1, 1 + tiles, channels, size, size], and image_sizes: int64[1, 2], height and
    width of the image in pixels.
    """

    def __init__(self, model: Any):
        config = model.config
        self._model: Any = model.model
        self._layer: int | list[int] = config.vision_feature_layer
        self._strategy: str = config.vision_feature_select_strategy

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image."""
        found = self._model.get_image_features(
            pixel_values=tensors["pixel_values"],
            image_sizes=tensors["image_sizes"].tolist(),
            vision_feature_layer=self._layer,
            vision_feature_select_strategy=self._strategy,
            return_dict=True,
        )
        return EncodedInput(found.pooler_output[0])
