"""Images and videos of the Qwen-VL families, at their own sizes: patches, in the order of the squares that are merged.

A patch holds its pixels in `temporal_patch_size` frames; an image is a frame that is repeated. A row of pixel_values is
one patch, by channel, frame, row and column. With a merge size of 2, patches are in the order

    0 1 | 4 5
    2 3 | 6 7

and 4 successive ones become one embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ModelError, RequestError
from engine.multimodal.families import PATCHES_AT_ONCE
from engine.multimodal.processors.image_processor import (
    OPTIONS,
    ImageProcessor,
    check_pixels,
    load_image_processor,
)
from engine.multimodal.processors.squares import fit
from engine.multimodal.processors.video_frames import VIDEO_FRAMES, read_video_options
from engine.multimodal.types import MediaKind, Video
from engine.text import first_line

MOST_RATIO = 200  # of an image's sides
VIDEO_OPTIONS = ("max_pixels", "min_pixels", "size")


@dataclass(frozen=True, slots=True)
class Patches:
    """The patches of an image or video.

    values: float32[patches, values of a patch]. grid: frames, rows and columns of patches; merge: patches in the row of
    a merged square.
    """

    values: NDArray[np.float32]
    grid: tuple[int, int, int]
    merge: int

    @property
    def merged(self) -> tuple[int, int, int]:
        """Frames, rows and columns of embeddings."""
        frames, rows, columns = self.grid
        return frames, rows // self.merge, columns // self.merge

    @property
    def tensors(self) -> dict[str, NDArray[Any]]:
        """What the encoder needs."""
        return {"pixel_values": self.values, "grid_thw": np.array([self.grid], dtype=np.int64)}


class QwenVision:
    """Makes patches.

    Args:
        images: Qwen2VLImageProcessor.
        vision: the model's vision_config.
        video_size: the fewest and most pixels of a frame; with `whole_videos`, of all frames together.
    """

    def __init__(self, images: ImageProcessor, vision: Any, video_size: tuple[int, int], *, whole_videos: bool):
        self._images = images
        size = dict(images.inner.size)
        self._image_size: tuple[int, int] = size["shortest_edge"], size["longest_edge"]
        self._fixed: dict[str, int] = {
            "do_resize": True,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        self._factor: int = vision.patch_size * vision.spatial_merge_size
        self._video_size = video_size
        self._whole_videos = whole_videos

    @property
    def frames_per_patch(self) -> int:
        return self._fixed["temporal_patch_size"]

    def image(self, image: Image.Image, options: Mapping[str, Any]) -> Patches:
        """The patches of an image.

        Raises RequestError for sides whose ratio is too large, and for options that the model doesn't take.
        """
        _check_ratio(image.width, image.height)
        limits = pixel_limits(options, self._image_size)
        others = {name: value for name, value in options.items() if name not in VIDEO_OPTIONS}
        height, width = fit(image.height, image.width, self._factor, limits)
        check_pixels(image, width, height)
        named = {"shortest_edge": limits[0], "longest_edge": limits[1]}
        found = self._images(image, {**others, "size": named}, **self._fixed)
        _, rows, columns = (int(count) for count in found["image_grid_thw"][0])
        return Patches(found["pixel_values"], (1, rows, columns), self._fixed["merge_size"])

    def video(self, video: Video, options: Mapping[str, Any]) -> Patches:
        """The patches of a video; its last frame is repeated where frames are missing in the last patches.

        Raises RequestError for sides whose ratio is too large, and for options that the model doesn't take.
        """
        unknown = sorted(options.keys() - set(VIDEO_OPTIONS))
        if unknown:
            own = ", ".join(VIDEO_OPTIONS)
            raise RequestError(f"videos of this model have no option {unknown[0]!r}; they have {own}", OPTIONS)
        count, height, width, _ = video.frames.shape
        if not count:
            raise RequestError("the video has no frames", "video_url")
        _check_ratio(width, height)
        limits = pixel_limits(options, self._video_size)
        factor, per_patch = self._factor, self.frames_per_patch
        fitted = fit_frames(count, height, width, factor, per_patch, limits) if self._whole_videos else None
        height, width = fitted or fit(height, width, factor, limits)
        pixels = np.empty((-(-count // per_patch) * per_patch, 3, height, width), dtype=np.float32)
        inner = self._images.inner
        for number, frame in enumerate(video.frames):
            resized = np.asarray(Image.fromarray(frame).resize((width, height), inner.resample))
            scaled = inner.rescale(np.moveaxis(resized, -1, 0), inner.rescale_factor)
            pixels[number] = inner.normalize(scaled, inner.image_mean, inner.image_std)
        pixels[count:] = pixels[count - 1]
        return patches_of(pixels, self._fixed["patch_size"], self._fixed["merge_size"], per_patch)

    def most_embeddings(self, kind: MediaKind, options: Mapping[str, Any], most_frames: int = VIDEO_FRAMES) -> int:
        """The most embeddings of an image, or of a video with so many frames at most."""
        if kind == "image":
            return most_squares(self._factor, pixel_limits(options, self._image_size))
        fewest, most = pixel_limits(options, self._video_size)
        per_patch, found = self.frames_per_patch, 0
        for frames in range(per_patch, most_frames + per_patch, per_patch):
            shared = frames if self._whole_videos else 1
            squares = most_squares(self._factor, (fewest / shared, most / shared))
            found = max(found, frames // per_patch * squares)
        return found

    def most_at_once(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        """The most embeddings of an image or of the frames of a video that are encoded together."""
        if kind == "image":
            return self.most_embeddings(kind, options)
        fewest, most = pixel_limits(options, self._video_size)
        shared = self.frames_per_patch if self._whole_videos else 1
        frame = most_squares(self._factor, (fewest / shared, most / shared))
        return max(frame, PATCHES_AT_ONCE // self._fixed["merge_size"] ** 2)


def patches_of(pixels: NDArray[np.float32], patch: int, merge: int, per_patch: int) -> Patches:
    """The patches of frames, float32[frames, channels, height, width]."""
    frames, channels, height, width = pixels.shape
    times, rows, columns = frames // per_patch, height // patch, width // patch
    split = (times, per_patch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    # By time, row and column of the square, row and column in it, channel, frame, row and column in the patch.
    values = pixels.reshape(split).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(times * rows * columns, -1)
    return Patches(values, (times, rows, columns), merge)


def pixel_limits(options: Mapping[str, Any], own: tuple[int, int]) -> tuple[int, int]:
    """The fewest and most pixels: those of the options, else the model's own.

    Raises RequestError if they are not two integers in that order.
    """
    size = options.get("size", {})
    if not isinstance(size, Mapping):
        raise RequestError("size must have shortest_edge and longest_edge, the fewest and most pixels", OPTIONS)
    fewest = options.get("min_pixels", size.get("shortest_edge", own[0]))
    most = options.get("max_pixels", size.get("longest_edge", own[1]))
    if not isinstance(fewest, int) or not isinstance(most, int) or not 0 < fewest <= most:
        raise RequestError(
            f"min_pixels and max_pixels must be integers of at least 1 in that order, not {fewest!r} and {most!r}",
            OPTIONS,
        )
    return fewest, most


def most_squares(factor: int, limits: tuple[float, float]) -> int:
    """The most squares of `factor` x `factor` pixels that `fit` makes of an image with any sides it may have.

    Scaled down, sides are rounded down, but to 1 square at least; scaled up, both are rounded up.
    """
    fewest, most = (pixels / factor**2 for pixels in limits)
    longest = math.sqrt(MOST_RATIO)
    up = fewest + math.sqrt(fewest) * (longest + 1 / longest) + 1
    return int(max(most, math.sqrt(most) * longest, up))


def fit_frames(
    frames: int, height: int, width: int, factor: int, per_patch: int, limits: tuple[int, int]
) -> tuple[int, int]:
    """As `fit`, with limits for the pixels of all frames of a video."""
    frames = max(frames, per_patch)
    if min(height, width) < factor:
        scale = factor / min(height, width)
        height, width = int(height * scale), int(width * scale)
    rows, columns = round(height / factor), round(width / factor)
    pixels = round(frames / per_patch) * per_patch * rows * columns * factor * factor
    fewest, most = limits
    if pixels > most:
        scale = math.sqrt(frames * height * width / most)
        rows, columns = (max(1, math.floor(side / scale / factor)) for side in (height, width))
    elif pixels < fewest:
        scale = math.sqrt(fewest / (frames * height * width))
        rows, columns = (math.ceil(side * scale / factor) for side in (height, width))
    return rows * factor, columns * factor


def _check_ratio(width: int, height: int) -> None:
    if max(width, height) > MOST_RATIO * min(width, height):
        raise RequestError(
            f"{width}x{height} pixels: the model takes images and videos with sides in a ratio of at most {MOST_RATIO}"
        )


def load_qwen_vision(folder: Path, vision: Any, defaults: Mapping[str, Any], *, whole_videos: bool) -> QwenVision:
    """The images and videos of a model.

    Args:
        folder: the model's folder.
        vision: its vision_config.
        defaults: options of the image processor if the folder has none. `video_size` has the limits of videos, as size.
        whole_videos: those limits are for all frames of a video together.
    """
    own = {name: value for name, value in defaults.items() if name != "video_size"}
    images = load_image_processor(folder, "Qwen2VLImageProcessor", own)
    fields = read_video_options(folder) or {}
    size = dict(defaults["video_size"])
    if isinstance(fields.get("size"), dict):
        size |= fields["size"]
    fewest = fields.get("min_pixels") or size.get("shortest_edge")
    most = fields.get("max_pixels") or size.get("longest_edge")
    try:
        limits = pixel_limits({}, (fewest, most))  # type: ignore[arg-type]
    except RequestError as error:
        raise ModelError(f"{folder}: the sizes of videos can't be used: {first_line(error)}") from error
    return QwenVision(images, vision, limits, whole_videos=whole_videos)
