"""Images of simulated requests: their tokens in the prompt, what the core gets of them, and their processing."""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.arrays import Int32s
from engine.errors import ConfigError
from engine.hardware.description import Processing
from engine.hardware.towers import MOLMO_CROPS, clip_patches, molmo_tokens
from engine.messages import MMInputRef
from engine.multimodal.processors.crops import CropSettings, select_tiling
from engine.multimodal.processors.squares import fit

MOLMO_CROP = (336, 14, 4, 4)  # pixels of a crop and of a patch, patches of its two margins
QWEN_SQUARE = 28  # pixels of an embedding's square
QWEN_PIXELS = (4 * QWEN_SQUARE**2, 1280 * QWEN_SQUARE**2)  # the fewest and most of an image


@dataclass(frozen=True, slots=True)
class SimulatedImage:
    """An image of a request: its size in pixels, and what tells equal ones; those are encoded once."""

    width: int
    height: int
    content: bytes

    @property
    def megapixels(self) -> float:
        return self.width * self.height / 1e6


def image_tokens(config: Mapping[str, Any], width: int, height: int) -> int:
    """Tokens of an image in the prompt, by the fields of the model's config.json, as its processor makes them.

    Raises ConfigError for a model whose images aren't known.
    """
    family, vision = config.get("model_type", ""), config.get("vision_config") or {}
    if family == "molmo":
        return _molmo(width, height)
    if vision.get("model_type") == "pixtral":
        edge = vision["patch_size"] * config.get("spatial_merge_size", 1)
        shrink = max(width / vision["image_size"], height / vision["image_size"], 1.0)
        columns, rows = (-(-math.floor(side / shrink) // edge) for side in (width, height))
        return rows * (columns + 1)
    if family == "qwen2_vl":
        rows, columns = fit(height, width, QWEN_SQUARE, QWEN_PIXELS)
        return rows * columns // QWEN_SQUARE**2
    if family == "llava":
        return clip_patches(vision)
    raise ConfigError(f"the latency model doesn't know how many tokens an image of {family or 'this model'} has")


def _molmo(width: int, height: int) -> int:
    settings = CropSettings(*MOLMO_CROP)
    return molmo_tokens(*select_tiling(height, width, settings, MOLMO_CROPS))


def with_images(
    config: Mapping[str, Any], prompt: Sequence[int] | Int32s, images: Sequence[SimulatedImage], placeholder: int
) -> tuple[Int32s, tuple[MMInputRef, ...]]:
    """A prompt with images before its text, and what an AddRequest says of them.

    Args:
        config: fields of the model's config.json.
        prompt: the tokens of the text.
        placeholder: the id of the token that stands for an embedding.
    """
    inputs, at = [], 0
    for one in images:
        length = image_tokens(config, one.width, one.height)
        inputs.append(MMInputRef(one.content, at, length))
        at += length
    return np.concatenate([np.full(at, placeholder, np.int32), np.asarray(prompt, np.int32)]), tuple(inputs)


class ImageProcessing:
    """When the images of a request are processed: by a number of processes, first come first served.

    An image that was processed before is found in the feature cache and takes no time.
    """

    def __init__(self, costs: Processing, processes: int, *, cached: bool = True):
        self._costs = costs
        self._free = [0.0] * processes  # a heap: when each process has nothing left to do
        self._seen: set[bytes] | None = set() if cached else None

    def seconds(self, images: Sequence[SimulatedImage]) -> float:
        """CPU time of images, of those that aren't in the feature cache; from now on they are."""
        return sum(map(self._seconds, images))

    def end(self, now: float, images: Sequence[SimulatedImage]) -> float:
        """When the last image of a request is ready, if it arrives now."""
        ready = now
        for one in images:
            if not (seconds := self._seconds(one)):
                continue
            done = max(heapq.heappop(self._free), now) + seconds
            heapq.heappush(self._free, done)
            ready = max(ready, done)
        return ready

    def _seconds(self, image: SimulatedImage) -> float:
        if self._seen is not None:
            if image.content in self._seen:
                return 0.0
            self._seen.add(image.content)
        return self._costs.megapixel_ms * 1e-3 * image.megapixels
