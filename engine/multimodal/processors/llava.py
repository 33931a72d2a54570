"""Images of LLaVA 1.5; a model of the same layout with a Pixtral tower has the processor `pixtral`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.multimodal.processors import pixtral
from engine.multimodal.processors.image_processor import ImageProcessor, load_image_processor
from engine.multimodal.processors.patch_grid import patch_grid
from engine.multimodal.types import MediaKind, Processed, Processor

SIGLIP = "siglip_vision_model"


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a LlavaForConditionalGeneration."""
    vision = hf_config.vision_config
    if vision.model_type == "pixtral":
        return pixtral.make(folder, hf_config)
    square = {"height": vision.image_size, "width": vision.image_size}
    if vision.model_type == SIGLIP:
        images = load_image_processor(folder, "SiglipImageProcessor", {"size": square})
    else:
        edge = {"shortest_edge": vision.image_size}
        images = load_image_processor(folder, "CLIPImageProcessor", {"size": edge, "crop_size": square})
    return LlavaProcessor(images, hf_config)


class LlavaProcessor:
    """One token for each feature of the resized image."""

    def __init__(self, images: ImageProcessor, hf_config: Any):
        self._images = images
        self._grid = patch_grid(hf_config)
        self._token: int = hf_config.image_token_index

    def process(
        self,
        kind: MediaKind,  # noqa: ARG002  (images only)
        media: Any,
        count: int,  # noqa: ARG002
        options: Mapping[str, Any],
    ) -> Processed:
        """See `Processor`."""
        pixels = self._images(media, options)["pixel_values"]
        self._grid.check(pixels.shape)
        return Processed([self._token] * self._grid.features, {"pixel_values": pixels})

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:  # noqa: ARG002
        """See `Processor`."""
        return self._grid.features
