"""Molmo's first generation: up to 12 crops that overlap, and the whole image before them.

<im_start> 12 x (12 <im_patch> <im_col>) <im_end>  <im_start> rows x (columns <im_patch> <im_col>) <im_end>
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ModelError, RequestError
from engine.multimodal.processors.added_tokens import check_tokens
from engine.multimodal.processors.crops import (
    CropSettings,
    cut_crops,
    cut_patches,
    kept_cells,
    select_tiling,
    tilings,
)
from engine.multimodal.processors.image_processor import read_options
from engine.multimodal.processors.options import OPTIONS, refuse_options
from engine.multimodal.types import MediaKind, Processed

MOST = "max_crops"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


class MolmoProcessor:
    """The tensors are those of `engine.model.molmo.modeling.MolmoModel.get_image_features`.

    Args:
        settings: of the crops.
        most_crops: of an image, besides the whole image.
        normalization: mean and standard deviation of the channels.
        tokens: ids of <im_start>, <im_end>, <im_patch> and <im_col>.
    """

    def __init__(
        self,
        settings: CropSettings,
        most_crops: int,
        normalization: tuple[NDArray[np.float32], NDArray[np.float32]],
        tokens: tuple[int, int, int, int],
    ):
        self._settings = settings
        self._most = most_crops
        self._mean, self._std = normalization
        self._start, self._end, self._patch, self._column = tokens
        self._side = -(-settings.patches // 2)  # embeddings of a crop, in each direction

    def process(self, kind: MediaKind, media: Image.Image, count: int, options: Mapping[str, Any]) -> Processed:
        del kind, count
        settings, side = self._settings, self._side
        tiling = select_tiling(media.height, media.width, settings, self._most_crops(options))
        canvas, mask = self._fit(media, settings.canvas(tiling))
        whole, _ = self._fit(media, (settings.size, settings.size))
        crops = np.stack([whole, *cut_crops(canvas, tiling, settings)])
        inside = np.stack(cut_crops(mask, tiling, settings))[..., None].astype(np.float32)
        masks = cut_patches(inside, settings.patch).mean(-1, dtype=np.float32)
        # In training the masks began with the first crop and not with the whole image; the last one was -1.
        masks = np.concatenate([masks, np.full_like(masks[:1], -1)])
        cells = kept_cells(tiling, side, settings.left // 2, settings.right // 2)
        order = np.concatenate([np.arange(side * side), side * side + cells.ravel()])
        tensors: dict[str, NDArray[Any]] = {
            "images": cut_patches(crops, settings.patch),
            "image_masks": masks,
            "image_order": order,
        }
        return Processed([*self._rows(side, side), *self._rows(*cells.shape)], tensors)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        del kind
        sizes = [self._settings.canvas(tiling) for tiling in tilings(self._most_crops(options))]
        cell = 2 * self._settings.patch
        crops = max((-(-height // cell)) * (-(-width // cell) + 1) for height, width in sizes)
        return 2 + self._side * (self._side + 1) + 2 + crops

    def _most_crops(self, options: Mapping[str, Any]) -> int:
        refuse_options(options, (MOST,))
        most = options.get(MOST, self._most)
        if not isinstance(most, int) or not 1 <= most <= self._most:
            raise RequestError(f"{MOST} must be an integer from 1 to {self._most}, not {most!r}", OPTIONS)
        return most

    def _rows(self, rows: int, columns: int) -> list[int]:
        return [self._start, *([self._patch] * columns + [self._column]) * rows, self._end]

    def _fit(self, image: Image.Image, size: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The image in the middle of a black canvas, normalized, and which pixels of the canvas are image.

        Raises RequestError for an image that would be less than a pixel high or wide.
        """
        height, width = size
        scale = min(np.float32(height) / np.float32(image.height), np.float32(width) / np.float32(image.width))
        inner = int(np.float32(image.height) * scale), int(np.float32(image.width) * scale)
        if min(inner) < 1:
            raise RequestError(
                f"an image of {image.width}x{image.height} pixels is too narrow for the model: it would be "
                f"{inner[1]}x{inner[0]} pixels"
            )
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        inside = np.zeros(size, dtype=np.bool_)
        inside[top : top + inner[0], left : left + inner[1]] = True
        canvas = np.zeros((*size, 3), dtype=np.float32)
        for channel, band in enumerate(image.split()):
            # In float32: PIL would round to bytes.
            values = Image.fromarray(np.asarray(band, dtype=np.float32) / np.float32(255))
            resized = values.resize((inner[1], inner[0]), Image.Resampling.BILINEAR)
            canvas[top : top + inner[0], left : left + inner[1], channel] = np.asarray(resized).clip(0, 1)
        return (canvas - self._mean) / self._std, inside


def make(folder: Path, hf_config: Any) -> MolmoProcessor:
    """Raises ModelError if the folder's options or tokens don't fit the model."""
    fields, vision = read_options(folder) or {}, hf_config.vision_config
    left, right = fields.get("overlap_margins", (4, 4))
    settings = CropSettings(vision.image_size, vision.patch_size, left, right)
    size, patch = fields.get("base_image_input_size", settings.size), fields.get("image_patch_size", settings.patch)
    if size not in (settings.size, [settings.size] * 2) or patch != settings.patch:
        raise ModelError(
            f"{folder}: its image processor makes crops of {size} pixels with patches of {patch}, the model takes "
            f"{settings.size} and {settings.patch}"
        )
    if left % 2 or right % 2 or settings.window < settings.patch:
        raise ModelError(f"{folder}: overlap_margins {left} and {right} must be even, and fit a crop")
    normalization = (
        np.array(fields.get("image_mean") or MEAN, dtype=np.float32),
        np.array(fields.get("image_std") or STD, dtype=np.float32),
    )
    check_tokens(folder, hf_config.new_tokens)
    tokens = tuple(hf_config.new_tokens[name] for name in ("<im_start>", "<im_end>", "<im_patch>", "<im_col>"))
    return MolmoProcessor(settings, fields.get(MOST, 12), normalization, tokens)
