"""Molmo 2: up to 8 crops that overlap, and the whole image before them.

<low_res_im_start> 14 x (14 <im_patch> <im_col>) <im_end>
<im_start> rows x (columns <im_patch> <im_col>) <im_end>
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ModelError, RequestError
from engine.multimodal.families import FRAMES_AT_ONCE
from engine.multimodal.processors.added_tokens import check_tokens
from engine.multimodal.processors.crops import (
    CropSettings,
    cut_crops,
    cut_patches,
    kept_cells,
    select_tiling,
    tilings,
)
from engine.multimodal.processors.image_processor import read_options, read_processor_options
from engine.multimodal.processors.molmo2_frames import FrameTokens, Molmo2Frames, load_frames, pooled, stretched
from engine.multimodal.processors.options import OPTIONS, refuse_options
from engine.multimodal.processors.video_frames import VIDEO_FRAMES
from engine.multimodal.types import MediaKind, Processed

MOST = "max_crops"
SIZE, PATCH, POOLING, CROPS = 378, 14, (2, 2), 8
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Layout:
    """Token ids, and whether rows of the whole image and of the crops end with <im_col>."""

    patch: int
    column: int
    start: int
    whole_start: int
    end: int
    whole_columns: bool = True
    crop_columns: bool = True

    def whole(self, rows: int, columns: int) -> list[int]:
        line = [self.patch] * columns + [self.column] * self.whole_columns
        return [self.whole_start, *line * rows, self.end]

    def crops(self, rows: int, columns: int) -> list[int]:
        line = [self.patch] * columns + [self.column] * self.crop_columns
        return [self.start, *line * rows, self.end]


class Molmo2Processor:
    """The tensors are `pixel_values`, `image_token_pooling` and `image_grids` of transformers' class.

    Args:
        settings: of the crops.
        most_crops: of an image, besides the whole image.
        pooling: rows and columns of patches that become one embedding.
        normalization: mean and standard deviation of the channels.
        layout: of the tokens.
        frames: those of videos.
    """

    def __init__(
        self,
        settings: CropSettings,
        most_crops: int,
        pooling: tuple[int, int],
        normalization: tuple[NDArray[np.float32], NDArray[np.float32]],
        layout: Layout,
        frames: Molmo2Frames,
    ):
        self._settings = settings
        self._most = most_crops
        self._pooling = pooling
        self._mean, self._std = normalization
        self._layout = layout
        self._frames = frames

    def process(self, kind: MediaKind, media: Any, count: int, options: Mapping[str, Any]) -> Processed:
        del count
        if kind == "video":
            refuse_options(options, (MOST,))  # which has no effect on frames
            return self._frames.process(media)
        settings, side = self._settings, self._settings.patches
        tiling = select_tiling(media.height, media.width, settings, self._most_crops(options))
        canvas = self._resized(media, settings.canvas(tiling))
        whole = self._resized(media, (settings.size, settings.size))
        pixels = np.stack([whole, *cut_crops(canvas, tiling, settings)])
        first = pooled(np.arange(side * side).reshape(side, side), self._pooling)
        crops = pooled(side * side + kept_cells(tiling, side, settings.left, settings.right), self._pooling)
        grid = (*first.shape[:2], *crops.shape[:2])
        tensors: dict[str, NDArray[Any]] = {
            "pixel_values": cut_patches(pixels, settings.patch),
            "image_token_pooling": np.concatenate([one.reshape(-1, one.shape[-1]) for one in (first, crops)]),
            "image_grids": np.array([grid], dtype=np.int64),
        }
        return Processed([*self._layout.whole(*grid[:2]), *self._layout.crops(*grid[2:])], tensors)

    def most_at_once(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        """The most embeddings that are encoded at once, as if each had as many patches as those of an image."""
        if kind == "video":
            return FRAMES_AT_ONCE * self._settings.patches**2 // (self._pooling[0] * self._pooling[1])
        return self.most_tokens(kind, options)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any], frames: int = VIDEO_FRAMES) -> int:
        if kind == "video":
            return self._frames.most_tokens(frames)
        most = self._most_crops(options)
        sizes = [self._settings.canvas(tiling) for tiling in tilings(most)]
        (rows, columns), patch = self._pooling, self._settings.patch

        def grid(height: int, width: int) -> tuple[int, int]:
            return -(-height // (rows * patch)), -(-width // (columns * patch))

        whole = self._layout.whole(*grid(self._settings.size, self._settings.size))
        return len(whole) + max(len(self._layout.crops(*grid(*size))) for size in sizes)

    def _most_crops(self, options: Mapping[str, Any]) -> int:
        refuse_options(options, (MOST,))
        most = options.get(MOST, self._most)
        if not isinstance(most, int) or most < 1:
            raise RequestError(f"{MOST} must be an integer of at least 1, not {most!r}", OPTIONS)
        if most > self._most:
            raise RequestError(f"{MOST} must be at most {self._most}, not {most}", OPTIONS)
        return most

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> NDArray[np.float32]:
        """The image stretched to a size and normalized, float32[height, width, 3]."""
        return stretched(np.asarray(image), size, (self._mean, self._std))


def make(folder: Path, hf_config: Any) -> Molmo2Processor:
    """Raises ModelError if the folder's options or tokens don't fit the model."""
    fields, more = read_options(folder) or {}, read_processor_options(folder)
    vision = hf_config.vision_config
    left, right = fields.get("overlap_margins", (4, 4))
    size, patch = fields.get("size", {"height": SIZE, "width": SIZE}), fields.get("patch_size", PATCH)
    settings = CropSettings(vision.image_size[0], vision.patch_size, left, right)
    if [size.get("height"), size.get("width")] != list(vision.image_size) or patch != settings.patch:
        raise ModelError(
            f"{folder}: its image processor makes crops of {size} with patches of {patch}, the model takes "
            f"{vision.image_size} and {settings.patch}"
        )
    if settings.size != vision.image_size[1] or settings.window < settings.patch:
        raise ModelError(f"{folder}: crops must be square and larger than overlap_margins {left} and {right}")
    columns = bool(more.get("image_use_col_tokens", True))
    whole_columns, whole_start = more.get("use_single_crop_col_tokens"), more.get("use_single_crop_start_token", True)
    first = hf_config.image_patch_id
    tokens = {
        "<im_patch>": first,
        "<im_col>": getattr(hf_config, "image_col_id", first + 1),
        "<im_start>": hf_config.image_start_token_id,
        "<low_res_im_start>": hf_config.low_res_image_start_token_id,
        "<im_end>": hf_config.image_end_token_id,
    }
    check_tokens(folder, tokens | {"<|image|>": first + 3})
    layout = Layout(
        patch=tokens["<im_patch>"],
        column=tokens["<im_col>"],
        start=tokens["<im_start>"],
        whole_start=tokens["<low_res_im_start>" if whole_start else "<im_start>"],
        end=tokens["<im_end>"],
        whole_columns=columns if whole_columns is None else bool(whole_columns),
        crop_columns=columns,
    )
    normalization = (
        np.array(fields.get("image_mean") or MEAN, dtype=np.float32),
        np.array(fields.get("image_std") or STD, dtype=np.float32),
    )
    rows, cols = fields.get("pooling_size", POOLING)
    around = ("frame_start_token_id", "frame_end_token_id")
    if not more.get("use_frame_special_tokens", True):
        around = ("image_start_token_id", "image_end_token_id")
    start, end = (int(getattr(hf_config, name)) for name in around)
    column = tokens["<im_col>"] if more.get("video_use_col_tokens", False) else None
    frames = load_frames(folder, settings.size, settings.patch, FrameTokens(first, start, end, column))
    return Molmo2Processor(settings, fields.get(MOST, CROPS), (rows, cols), normalization, layout, frames)
