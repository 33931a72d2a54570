"""Videos of Molmo 2: each frame stretched to the size of one crop, after its time in seconds as text.

"0.0 " <frame_start> rows x columns <im_patch> <frame_end> " 0.5 " <frame_start> ...
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError, RequestError
from engine.multimodal.processors.crops import cut_patches
from engine.multimodal.processors.texts import text_encoder
from engine.multimodal.processors.video_frames import check_size, read_video_options
from engine.multimodal.types import Processed, Video

POOLING, MOST_FRAMES, MOST_RATE = (3, 3), 64, 2.0  # transformers' defaults
HALF = (0.5, 0.5, 0.5)
Normalization = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class FrameTokens:
    """Token ids; column: after each row, if it has one."""

    patch: int
    start: int
    end: int
    column: int | None


@dataclass(frozen=True, slots=True)
class Molmo2Frames:
    """The processing of videos.

    Args:
        size, patch: pixels of a crop and of a patch, in each direction.
        pooling: rows and columns of patches that become one embedding.
        normalization: mean and standard deviation of the channels.
        most: frames of a video.
        rate: the most frames of a second.
        tokens: of a frame.
        encode: tokenizes a text.
    """

    size: int
    patch: int
    pooling: tuple[int, int]
    normalization: Normalization
    most: int
    rate: float | None
    tokens: FrameTokens
    encode: Callable[[str], list[int]]

    def process(self, video: Video) -> Processed:
        """The tensors are those of an image whose rows are the rows of all frames, without crops."""
        if not len(video.frames):
            raise RequestError("the video has no frames", "video_url")
        video = self._sampled(video)
        count, side = len(video.frames), self.size // self.patch
        pixels = np.stack([stretched(one, (self.size, self.size), self.normalization) for one in video.frames])
        one = pooled(np.arange(side * side).reshape(side, side), self.pooling)
        rows, columns = one.shape[:2]
        numbers = one.reshape(1, rows * columns, -1)
        offsets = np.arange(count).reshape(-1, 1, 1) * side * side
        tokens = []
        for number, time in enumerate(video.times.tolist()):
            tokens += [*(self.encode(f" {time:.1f} ") if number else []), *self._frame(rows, columns)]
        tensors = {
            "pixel_values": cut_patches(pixels, self.patch),
            "image_token_pooling": np.where(numbers < 0, numbers, numbers + offsets).reshape(-1, numbers.shape[-1]),
            "image_grids": np.array([[count * rows, columns, 0, 0]], dtype=np.int64),
        }
        return Processed(tokens, tensors, before=f"{video.times[0]:.1f} ")

    def most_tokens(self, frames: int) -> int:
        """Of a video with so many frames at most."""
        rows, columns = (-(-self.size // (self.patch * each)) for each in self.pooling)
        one = len(self._frame(rows, columns)) + len(self.encode(" 99999.9 "))
        return min(frames, self.most) * one

    def _frame(self, rows: int, columns: int) -> list[int]:
        tokens = self.tokens
        line = [tokens.patch] * columns + ([] if tokens.column is None else [tokens.column])
        return [tokens.start, *line * rows, tokens.end]

    def _sampled(self, video: Video) -> Video:
        """At most as many frames as the model had of a video of that duration in training, evenly spaced."""
        given = len(video.frames)
        most = self.most
        if self.rate is not None and video.seconds:
            most = min(most, int(video.seconds * self.rate))
        most = max(most, 1)
        if given <= most:
            return video
        chosen = np.arange(0, given, given / most).astype(int)[:most]
        return Video(video.frames[chosen], video.times[chosen], video.seconds)


def load_frames(folder: Path, size: int, patch: int, tokens: FrameTokens) -> Molmo2Frames:
    """The processing of a folder's videos. Raises ModelError if its options don't fit the model."""
    fields = read_video_options(folder, else_of_images=False) or {}
    check_size(folder, fields, size)
    if fields.get("patch_size", patch) != patch:
        own = fields["patch_size"]
        raise ModelError(f"{folder}: its video processor makes patches of {own} pixels, the model takes {patch}")
    rows, columns = fields.get("pooling_size", POOLING)
    normalization = (
        np.array(fields.get("image_mean") or HALF, dtype=np.float32),
        np.array(fields.get("image_std") or HALF, dtype=np.float32),
    )
    most, rate = int(fields.get("num_frames") or MOST_FRAMES), fields.get("max_fps", MOST_RATE)
    return Molmo2Frames(size, patch, (rows, columns), normalization, most, rate, tokens, text_encoder(folder))


def stretched(pixels: NDArray[np.uint8], size: tuple[int, int], normalization: Normalization) -> NDArray[np.float32]:
    """An image stretched to a size and normalized, float32[height, width, 3]."""
    mean, std = normalization
    found: NDArray[np.float32] = np.rint(interpolate(pixels.astype(np.float32), size)).clip(0, 255)
    return (found / np.float32(255) - mean) / std


def interpolate(pixels: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Bilinear interpolation between four pixels, without smoothing when an image is reduced.

    Args:
        pixels: [height, width, channels].
        size: the new height and width.
    """
    for axis, length in enumerate(size):
        old = pixels.shape[axis]
        at = ((np.arange(length) + 0.5) * (old / length) - 0.5).clip(0)
        low = np.minimum(at.astype(np.int64), old - 1)
        high = np.minimum(low + 1, old - 1)
        weights = (at - low).astype(np.float32)
        weights = weights[:, None, None] if axis == 0 else weights[:, None]
        below = pixels.take(low, axis)
        pixels = below + (pixels.take(high, axis) - below) * weights
    return pixels


def pooled(patches: NDArray[np.int64], pooling: tuple[int, int]) -> NDArray[np.int64]:
    """Numbers of the patches that become one embedding: int64[rows, columns, patches of each], -1 for none.

    Missing patches are half at the beginning, half at the end.
    """
    missing = [-length % each for length, each in zip(patches.shape, pooling, strict=True)]
    padded = np.pad(patches, [(count // 2, (count + 1) // 2) for count in missing], constant_values=-1)
    rows, columns = (length // each for length, each in zip(padded.shape, pooling, strict=True))
    windows = padded.reshape(rows, pooling[0], columns, pooling[1]).transpose(0, 2, 1, 3)
    return windows.reshape(rows, columns, -1)
