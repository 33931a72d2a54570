"""The encoder of LLaVA-OneVision: tiles as in LLaVA-NeXT where a prompt has one image, else the whole image alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.model.encoders.base import EncodedInput, Encoder
from engine.multimodal.families import FRAMES_AT_ONCE


def make(model: Any) -> Encoder:
    """`model` is transformers' LlavaOnevisionForConditionalGeneration."""
    return LlavaOnevisionEncoder(model)


class LlavaOnevisionEncoder:
    """The embeddings of the whole image, then those of its tiles by rows of the image, without padding.

    The input has pixel_values: float32[1, 1 + tiles, channels, size, size], and image_sizes: int64[1, 2], height and
    width of the image in pixels. Without tiles one embedding for the end of a line follows those of the image.

    A video has pixel_values_videos: float32[frames, channels, size, size]. One embedding for the end of a line follows
    those of its frames.
    """

    def __init__(self, model: Any):
        config = model.config
        self._model: Any = model.model
        self._layer: int | list[int] = config.vision_feature_layer
        self._strategy: str = config.vision_feature_select_strategy
        self._aspect_ratio: str = config.vision_aspect_ratio

    def encode(self, tensors: Mapping[str, Tensor]) -> EncodedInput:
        """Encode one image or video."""
        if "pixel_values_videos" in tensors:
            return self._encode_video(tensors["pixel_values_videos"])
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

    def _encode_video(self, frames: Tensor) -> EncodedInput:
        """Some frames after the other, so that a long video needs no more memory than a short one."""
        parts = []
        for some in frames.split(FRAMES_AT_ONCE):
            found = self._model.get_video_features(
                pixel_values_videos=some[None],
                vision_feature_layer=self._layer,
                vision_feature_select_strategy=self._strategy,
                return_dict=True,
            )
            parts.append(found.pooler_output[0, :-1])
            end = found.pooler_output[0, -1:]
        return EncodedInput(torch.cat([*parts, end]))
