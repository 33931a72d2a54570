"""The encoder of LLaVA-OneVision: tiles as in LLaVA-NeXT where a prompt has one image, else the whole image alone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder


def make(model: Any) -> Encoder:
    """`model` is transformers' LlavaOnevisionForConditionalGeneration."""
    return LlavaOnevisionEncoder(model)


class LlavaOnevisionEncoder:
    """The embeddings of the whole image, then those of its tiles by rows of the image, without padding.

    The input has pixel_values: float32[1, 1 + tiles, channels, size, size], and image_sizes: int64[1, 2], height and
    width of the image in pixels. Without tiles one embedding for the end of a line follows those of the image.
    """

    def __init__(self, model: Any):
        config = model.config
        self._model: Any = model.model
        self._layer: int | list[int] = config.vision_feature_layer
        self._strategy: str = config.vision_feature_select_strategy
        self._aspect_ratio: str = config.vision_aspect_ratio

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image."""
        pixels = tensors["pixel_values"]
        tiled = pixels.shape[1] > 1
        found = self._model.get_image_features(
            pixel_values=pixels,
            image_sizes=tensors["image_sizes"].tolist(),
            vision_feature_layer=self._layer,
            vision_feature_select_strategy=self._strategy,
            vision_aspect_ratio=self._aspect_ratio,
            # One image of several in a prompt isn't divided: with a number other than 1 the class expects no tiles.
            batch_num_images=[1 if tiled else 2],
            return_dict=True,
        )
        return EncodedInput(found.pooler_output[0])
