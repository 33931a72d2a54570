"""Videos of towers that take images of one size: each frame becomes such an image."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ModelError, RequestError
from engine.media.limits import MediaLimits
from engine.multimodal.processors.image_processor import OPTIONS, ImageProcessor, read_options
from engine.multimodal.types import Video

VIDEO_FRAMES = MediaLimits().video_frames  # the most frames of a video, without --video-frames
FILE, PART = "video_preprocessor_config.json", "video_processor"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VideoFrames:
    """Resizes and normalizes frames.

    Args:
        images: the image processor of the model. Its options are those of images, and have no effect on videos.
        fields: the options of videos that the folder has, as transformers' video processors have them.
        side: height and width of the tower's images in pixels.
        resample: Pillow's filter, unless `fields` name one.
    """

    def __init__(self, images: ImageProcessor, fields: Mapping[str, Any] | None, side: int, resample: int):
        inner = images.inner
        own = {"image_mean": inner.image_mean, "image_std": inner.image_std} if fields is None else fields
        self._inner: Any = inner
        self._side = side
        self._resample = int(own.get("resample", resample))
        self._factor = float(own.get("rescale_factor", 1 / 255))
        self._mean, self._std = own.get("image_mean", CLIP_MEAN), own.get("image_std", CLIP_STD)

    def __call__(self, video: Video, options: Mapping[str, Any]) -> NDArray[np.float32]:
        """The frames, float32[frames, channels, side, side].

        Raises RequestError for an option that the model's images don't have, and for a video without frames.
        """
        unknown = sorted(options.keys() - self._inner.valid_kwargs.__annotations__.keys())
        if unknown:
            raise RequestError(f"the model's processor has no option {unknown[0]!r}", OPTIONS)
        if not len(video.frames):
            raise RequestError("the video has no frames", "video_url")
        # In this order in memory, in which np.stack wouldn't leave them, a file is written without a copy.
        pixels = np.empty((len(video.frames), 3, self._side, self._side), dtype=np.float32)
        for number, frame in enumerate(video.frames):
            pixels[number] = self._frame(frame)
        return pixels

    def _frame(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        resized = self.resize(Image.fromarray(frame))
        scaled = self._inner.rescale(np.moveaxis(np.asarray(resized), -1, 0), self._factor)
        normalized: NDArray[np.float32] = self._inner.normalize(scaled, self._mean, self._std)
        return normalized

    def resize(self, frame: Image.Image) -> Image.Image:
        """The frame in the tower's size."""
        return frame.resize((self._side, self._side), self._resample)


def check_size(folder: Path, fields: Mapping[str, Any] | None, side: int) -> None:
    """Raise ModelError if the folder's options make frames of another size than the tower takes."""
    size = (fields or {}).get("size")
    if isinstance(size, Mapping) and {size.get("height", side), size.get("width", side)} != {side}:
        raise ModelError(f"{folder}: its video processor makes frames of {dict(size)}, the model takes {side}x{side}")


def read_video_options(folder: Path, *, else_of_images: bool = True) -> dict[str, Any] | None:
    """The options of videos, from the first place where transformers finds some; older folders have those of images.

    None if the folder has none. Without `else_of_images` those of images are not taken for them.
    """
    for file, part in ((folder / "processor_config.json", PART), (folder / FILE, None)):
        try:
            found = json.loads(file.read_text(encoding="utf-8-sig")) if file.is_file() else None
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} can't be read: {error}") from error
        if part is not None and isinstance(found, dict):
            found = found.get(part)
        if isinstance(found, dict):
            return found
    return read_options(folder) if else_of_images else None
