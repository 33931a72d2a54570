"""Images and videos of Qwen3-VL: as Qwen2-VL, and in a video the time is written as text before each frame."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.multimodal.processors.qwen_vision import QwenVision, load_qwen_vision
from engine.multimodal.processors.texts import text_encoder
from engine.multimodal.processors.video_frames import VIDEO_FRAMES
from engine.multimodal.types import MediaKind, Processed, Processor, Video


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a Qwen3VLForConditionalGeneration or Qwen3VLMoeForConditionalGeneration."""
    vision = hf_config.vision_config
    square = (vision.patch_size * vision.spatial_merge_size) ** 2
    defaults = {
        "size": {"shortest_edge": 4 * square, "longest_edge": 1280 * square},
        "video_size": {"shortest_edge": 128 * square, "longest_edge": 768 * square},  # of all frames
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    made = load_qwen_vision(folder, vision, defaults, whole_videos=True)
    return Qwen3VLProcessor(made, text_encoder(folder), hf_config)


class Qwen3VLProcessor:
    """A video is a text and a start, image and end part for each of its frames (after merging frames in patches).

    The chat template writes a start and an end token around the placeholder of a video as well, and transformers keeps
    them.
    """

    def __init__(self, vision: QwenVision, encode: Callable[[str], list[int]], hf_config: Any):
        self._vision = vision
        self._encode = encode
        self._image_token: int = hf_config.image_token_id
        self._video_token: int = hf_config.video_token_id
        self._start: int = hf_config.vision_start_token_id
        self._end: int = hf_config.vision_end_token_id

    def process(self, kind: MediaKind, media: Any, count: int, options: Mapping[str, Any]) -> Processed:  # noqa: ARG002
        """See `Processor`."""
        if kind != "video":
            patches = self._vision.image(media, options)
            _, rows, columns = patches.merged
            return Processed([self._image_token] * (rows * columns), patches.tensors, patches.merged)
        patches = self._vision.video(media, options)
        frames, rows, columns = patches.merged
        tokens: list[int] = []
        for time in patch_times(media, self._vision.frames_per_patch):
            tokens += [*self._encode(f"<{time:.1f} seconds>"), self._start]
            tokens += [self._video_token] * (rows * columns) + [self._end]
        return Processed(tokens, patches.tensors, (frames, rows, columns))

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any], frames: int = VIDEO_FRAMES) -> int:
        """See `Processor`."""
        found = self._vision.most_embeddings(kind, options, frames)
        if kind == "video":
            found += -(-frames // self._vision.frames_per_patch) * (len(self._encode("<99999.9 seconds>")) + 2)
        return found

    def most_at_once(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        """The most embeddings that the encoder computes at once: those of an image, or of some frames of a video."""
        return self._vision.most_at_once(kind, options)


def patch_times(video: Video, per_patch: int) -> list[float]:
    """The mean of the times of the first and the last frame in each patch, in seconds."""
    missing = -len(video.times) % per_patch
    times = np.pad(video.times, (0, missing), mode="edge").reshape(-1, per_patch)
    return [float(time) for time in (times[:, 0] + times[:, -1]) / 2]
