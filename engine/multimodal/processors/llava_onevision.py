"""Images and videos of LLaVA-OneVision: an image has tiles if it is the only one of a prompt, frames have none."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from engine.multimodal.families import FRAMES_AT_ONCE
from engine.multimodal.processors.any_resolution import (
    Size,
    best_resolution,
    full_patches,
    tiles_of,
    unpadded_patches,
)
from engine.multimodal.processors.image_processor import ImageProcessor, check_pixels, load_image_processor
from engine.multimodal.processors.patch_grid import patch_grid
from engine.multimodal.processors.video_frames import VIDEO_FRAMES, VideoFrames, check_size, read_video_options
from engine.multimodal.types import MediaKind, Processed, Processor

MOST_TILES = "anyres_max_"
SHRINKS = 1.1  # the tiles' features are shrunk if their rows and columns exceed the most by more than this factor


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a LlavaOnevisionForConditionalGeneration."""
    edge = hf_config.vision_config.image_size
    half = [0.5, 0.5, 0.5]
    defaults = {"size": {"height": edge, "width": edge}, "image_mean": half, "image_std": half}
    images = load_image_processor(folder, "LlavaOnevisionImageProcessor", defaults)
    fields = read_video_options(folder)
    check_size(folder, fields, edge)
    frames = VideoFrames(images, fields, edge, Image.Resampling.BICUBIC)
    return LlavaOnevisionProcessor(images, frames, hf_config)


class LlavaOnevisionProcessor:
    """One token for each feature of the whole image, then one for each feature of the tiles and for each row's end.

    An image of several in a prompt is made square by padding, and has one token for its end. So has a video, after one
    token for each feature of its frames, which are halved in each direction.
    """

    def __init__(self, images: ImageProcessor, frames: VideoFrames, hf_config: Any):
        self._images = images
        self._frames = frames
        self._grid = patch_grid(hf_config)
        self._token: int = hf_config.image_token_index
        self._video_token: int = hf_config.video_token_index
        self._per_frame = (-(-self._grid.patches // 2)) ** 2
        self._resolutions: list[list[int]] = [list(one) for one in hf_config.image_grid_pinpoints]
        self._most_tiles = int(hf_config.vision_aspect_ratio.removeprefix(MOST_TILES))

    def process(
        self,
        kind: MediaKind,
        media: Any,
        count: int,
        options: Mapping[str, Any],
    ) -> Processed:
        """See `Processor`."""
        if kind == "video":
            pixels = self._frames(media, options)
            tokens = [self._video_token] * (len(pixels) * self._per_frame + 1)
            return Processed(tokens, {"pixel_values_videos": pixels})
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

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any], frames: int = VIDEO_FRAMES) -> int:  # noqa: ARG002
        """See `Processor`."""
        if kind == "video":
            return frames * self._per_frame + 1
        tiles = [full_patches(one, self._grid) for one in self._resolutions]
        unshrunk = int(SHRINKS**2 * self._most_tiles * self._grid.patches**2)
        return self._grid.features + max(min(rows * columns, unshrunk) + rows for rows, columns in tiles)

    def most_at_once(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        """The most features that the encoder computes at once: those of an image, or of some frames of a video."""
        return FRAMES_AT_ONCE * self._grid.patches**2 if kind == "video" else self.most_tokens(kind, options)

    def _features_of_tiles(self, size: Size, resolution: Size) -> int:
        rows, columns = unpadded_patches(size, resolution, self._grid)
        ratio = math.sqrt(rows * columns / (self._most_tiles * self._grid.patches**2))
        if ratio > SHRINKS:
            rows, columns = int(rows // ratio), int(columns // ratio)
        return rows * (columns + 1)
