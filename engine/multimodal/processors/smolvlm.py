"""Images of SmolVLM, as those of Idefics3; and videos: frames in the size of one tile, each after its time as text."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine.errors import ModelError, RequestError
from engine.multimodal.families import FRAMES_AT_ONCE
from engine.multimodal.processors import idefics3
from engine.multimodal.processors.idefics3 import IMAGE, MOST_PIXELS_A_SIDE, Idefics3Processor, tiles_text
from engine.multimodal.processors.image_processor import ImageProcessor
from engine.multimodal.processors.texts import text_encoder
from engine.multimodal.processors.video_frames import VIDEO_FRAMES, VideoFrames, read_video_options
from engine.multimodal.types import MediaKind, Processed, Processor, Video

INTRO = "You are provided the following series of {frames} frames from a {duration} [H:MM:SS] video.\n"
TIME, AFTER = "\nFrame from {minutes:02d}:{seconds:02d}:", "\n\n"
NORMALIZATION = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # transformers' default
LONGEST_EDGE = 4  # tiles, transformers' default
MOST_FRAMES = 999  # whose number is written in words
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a SmolVLMForConditionalGeneration."""
    images = idefics3.make(folder, hf_config)
    fields = read_video_options(folder)
    frames = TwiceResized(images.images, fields, hf_config.vision_config.image_size)
    return SmolVLMProcessor(images, frames, fields or {}, text_encoder(folder), hf_config)


class TwiceResized(VideoFrames):
    """Frames are resized with their sides' ratio, and then to the square of a tile, as transformers' class does."""

    def __init__(self, images: ImageProcessor, fields: Mapping[str, Any] | None, side: int):
        own = None if fields is None else {**NORMALIZATION, **fields}
        super().__init__(images, own, side, Image.Resampling.LANCZOS)
        given = fields or {}
        size = given.get("video_sampling", {}).get("video_size", given.get("size", {}))
        self._longest = min(int(dict(size).get("longest_edge") or LONGEST_EDGE * side), MOST_PIXELS_A_SIDE)

    def resize(self, frame: Image.Image) -> Image.Image:
        """See `VideoFrames`."""
        return super().resize(frame.resize(whole_size(frame.width, frame.height, self._longest), self._resample))


class SmolVLMProcessor:
    """A video is a text with the number of its frames and its duration, then a text with the time before each frame.

    Args:
        images: that of images.
        frames: makes the frames' pixels.
        fields: options of videos: fps, the most frames of a second, and num_frames, the most of a video.
        encode: tokenizes a text.
    """

    def __init__(
        self,
        images: Idefics3Processor,
        frames: VideoFrames,
        fields: Mapping[str, Any],
        encode: Callable[[str], list[int]],
        hf_config: Any,
    ):
        sampling = fields.get("video_sampling", {})
        self._images = images
        self._frames = frames
        self._rate: float | None = sampling.get("fps", fields.get("fps"))
        self._most = int(sampling.get("max_frames", fields.get("num_frames")) or MOST_FRAMES)
        self._encode = encode
        self._token: int = hf_config.image_token_id

    def process(self, kind: MediaKind, media: Any, count: int, options: Mapping[str, Any]) -> Processed:
        """See `Processor`."""
        if kind != "video":
            return self._images.process(kind, media, count, options)
        video = self._sampled(media)
        pixels = self._frames(video, options)
        if len(pixels) > MOST_FRAMES:
            raise RequestError(f"a video of this model has at most {MOST_FRAMES} frames (--video-frames)")
        times = [TIME.format(minutes=int(time // 60), seconds=int(time % 60)) for time in video.times.tolist()]
        duration = timedelta(seconds=int(media.seconds or video.times[-1]))
        image = tiles_text(0, 0, self._images.per_tile)
        before = INTRO.format(frames=in_words(len(times)), duration=duration) + times[0]
        tokens = self._encode(image + "".join(time + image for time in times[1:]))
        if tokens.count(self._token) != len(pixels) * self._images.per_tile:
            raise ModelError(
                f"the tokenizer has another id for {IMAGE} than image_token_id in config.json, {self._token}"
            )
        return Processed(tokens, {"pixel_values_videos": pixels}, before=before, after=AFTER)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any], frames: int = VIDEO_FRAMES) -> int:
        """See `Processor`."""
        if kind != "video":
            return self._images.most_tokens(kind, options)
        image = self._encode(TIME.format(minutes=59, seconds=59) + tiles_text(0, 0, self._images.per_tile))
        return min(frames, self._most, MOST_FRAMES) * len(image)

    def most_at_once(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        """The most embeddings that the encoder computes at once: those of an image, or of some frames of a video."""
        if kind == "video":
            return FRAMES_AT_ONCE * self._images.per_tile
        return self._images.most_tokens(kind, options)

    def _sampled(self, video: Video) -> Video:
        """At most as many frames as the model had of a video of that duration in training, evenly spaced."""
        given = len(video.frames)
        most = self._most
        if self._rate is not None and video.seconds:
            most = min(most, round(self._rate * video.seconds))
        if given <= max(1, most):
            return video
        chosen = np.linspace(0, given - 1, max(1, most), dtype=int)
        return Video(video.frames[chosen], video.times[chosen], video.seconds)


def whole_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height with the longest side of so many pixels; the other one is rounded to an even number."""
    ratio = width / height
    if width >= height:
        other = int(longest / ratio)
        return longest, max(other + other % 2, 1)
    other = int(longest * ratio)
    return max(other + other % 2, 1), longest


def in_words(number: int) -> str:
    """A number from 0 to 999 in English words."""
    if number < len(UNITS):
        return UNITS[number]
    if number < 100:
        return TENS[number // 10] + (f"-{UNITS[number % 10]}" if number % 10 else "")
    rest = f" and {in_words(number % 100)}" if number % 100 else ""
    return f"{UNITS[number // 100]} hundred{rest}"
