"""Images of LLaVA-OneVision: with tiles where a prompt has one image, else the whole image alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from engine.multimodal.processors.any_resolution import (
    Size,
    best_resolution,
    full_patches,
    tiles_of,
    unpadded_patches,
)
from engine.multimodal.processors.image_processor import ImageProcessor, check_pixels, load_image_processor
from engine.multimodal.processors.patch_grid import patch_grid
from engine.multimodal.types import MediaKind, Processed, Processor

MOST_TILES = "anyres_max_"
SHRINKS = 1.1  # the tiles' features are shrunk if their rows and columns exceed the most by more than this factor


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a LlavaOnevisionForConditionalGeneration."""
    edge = hf_config.vision_config.image_size
    half = [0.5, 0.5, 0.5]
    defaults = {"size": {"height": edge, "width": edge}, "image_mean": half, "image_std": half}
    return LlavaOnevisionProcessor(load_image_processor(folder, "LlavaOnevisionImageProcessor", defaults), hf_config)


class LlavaOnevisionProcessor:
    """One token for each feature of the whole image, then one for each feature of the tiles and for each row's end.

    An image of several in a prompt is made square by padding, and has one token for its end.
    """

    def __init__(self, images: ImageProcessor, hf_config: Any):
        self._images = images
        self._grid = patch_grid(hf_config)
        self._token: int = hf_config.image_token_index
        self._resolutions: list[list[int]] = [list(one) for one in hf_config.image_grid_pinpoints]
        self._most_tiles = int(hf_config.vision_aspect_ratio.removeprefix(MOST_TILES))

    def process(
        self,
        kind: MediaKind,  # noqa: ARG002  (images only)
        media: Any,
        count: int,
        options: Mapping[str, Any],
    ) -> Processed:
        """See `Processor`."""
        fixed = {"image_grid_pinpoints": self._resolutions}
        size = (media.height, media.width)
        if count == 1:
            found = self._images(media, options, **fixed)
            resolution = best_resolution(size, self._resolutions)
            self._grid.check_tiles(found["pixel_values"].shape, tiles_of(resolution, self._grid.size))
            added = self._features_of_tiles(size, resolution)
        else:
            check_pixels(media, max(size), max(size))
            # The image processor divides an image unless its prompt has others.
            other = Image.new("RGB", (1, 1))
            found = self._images(media, options, images=[[media, other]], **fixed)
            found = {name: value[:1] for name, value in found.items()}
            self._grid.check_tiles(found["pixel_values"].shape, 0)
            added = 1
        tensors = {name: found[name] for name in ("pixel_values", "image_sizes")}
        return Processed([self._token] * (self._grid.features + added), tensors)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:  # noqa: ARG002
        """See `Processor`."""
        tiles = [full_patches(one, self._grid) for one in self._resolutions]
        unshrunk = int(SHRINKS**2 * self._most_tiles * self._grid.patches**2)
        return self._grid.features + max(min(rows * columns, unshrunk) + rows for rows, columns in tiles)

    def _features_of_tiles(self, size: Size, resolution: Size) -> int:
        rows, columns = unpadded_patches(size, resolution, self._grid)
        ratio = math.sqrt(rows * columns / (self._most_tiles * self._grid.patches**2))
        if ratio > SHRINKS:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return rows * (columns + 1)
