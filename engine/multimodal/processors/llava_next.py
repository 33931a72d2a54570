"""Images of LLaVA-NeXT: the whole image, and its tiles."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.multimodal.processors.any_resolution import best_resolution, full_patches, tiles_of, unpadded_patches
from engine.multimodal.processors.image_processor import ImageProcessor, load_image_processor
from engine.multimodal.processors.patch_grid import patch_grid
from engine.multimodal.types import MediaKind, Processed, Processor


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a LlavaNextForConditionalGeneration."""
    edge = hf_config.vision_config.image_size
    defaults = {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}
    return LlavaNextProcessor(load_image_processor(folder, "LlavaNextImageProcessor", defaults), hf_config)


class LlavaNextProcessor:
    """One token for each feature of the whole image, then one for each patch of the tiles and for each row's end."""

    def __init__(self, images: ImageProcessor, hf_config: Any):
        self._images = images
        self._grid = patch_grid(hf_config)
        self._token: int = hf_config.image_token_index
        # The model's, since the encoder finds the rows and columns of tiles with them.
        self._resolutions: list[list[int]] = [list(one) for one in hf_config.image_grid_pinpoints]

    def process(
        self,
        kind: MediaKind,  # noqa: ARG002  (images only)
        media: Any,
        count: int,  # noqa: ARG002
        options: Mapping[str, Any],
    ) -> Processed:
        """See `Processor`."""
        found = self._images(media, options, image_grid_pinpoints=self._resolutions)
        size = (media.height, media.width)
        resolution = best_resolution(size, self._resolutions)
        self._grid.check_tiles(found["pixel_values"].shape, tiles_of(resolution, self._grid.size))
        rows, columns = unpadded_patches(size, resolution, self._grid)
        tokens = [self._token] * (self._grid.features + rows * (columns + 1))
        return Processed(tokens, {name: found[name] for name in ("pixel_values", "image_sizes")})

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:  # noqa: ARG002
        """See `Processor`."""
        tiles = [full_patches(one, self._grid) for one in self._resolutions]
        return self._grid.features + max(rows * (columns + 1) for rows, columns in tiles)
