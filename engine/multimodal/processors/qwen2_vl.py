"""Images and videos of Qwen2-VL and Qwen2.5-VL: one token for each square of merged patches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.multimodal.processors.qwen_vision import QwenVision, load_qwen_vision
from engine.multimodal.processors.video_frames import VIDEO_FRAMES
from engine.multimodal.types import MediaKind, Processed, Processor, Video

SQUARE = 28  # pixels of the square of merged patches for which transformers' defaults are
DEFAULTS = {
    "size": {"shortest_edge": 4 * SQUARE**2, "longest_edge": 1280 * SQUARE**2},
    "video_size": {"shortest_edge": 128 * SQUARE**2, "longest_edge": 768 * SQUARE**2},  # of each frame
}


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a Qwen2VLForConditionalGeneration or Qwen2_5_VLForConditionalGeneration."""
    vision = load_qwen_vision(folder, hf_config.vision_config, DEFAULTS, whole_videos=False)
    return Qwen2VLProcessor(vision, hf_config)


class Qwen2VLProcessor:
    """The chat template writes the tokens for start and end around the placeholder."""

    def __init__(self, vision: QwenVision, hf_config: Any):
        self._vision = vision
        self._image_token: int = hf_config.image_token_id
        self._video_token: int = hf_config.video_token_id

    def process(self, kind: MediaKind, media: Any, count: int, options: Mapping[str, Any]) -> Processed:  # noqa: ARG002
        """See `Processor`."""
        if kind == "video":
            patches = self._vision.video(media, options)
            token, seconds = self._video_token, self._vision.frames_per_patch * frame_seconds(media)
        else:
            patches, token, seconds = self._vision.image(media, options), self._image_token, 0.0
        frames, rows, columns = patches.merged
        return Processed([token] * (frames * rows * columns), patches.tensors, patches.merged, seconds)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any], frames: int = VIDEO_FRAMES) -> int:
        """See `Processor`."""
        return self._vision.most_embeddings(kind, options, frames)

    def most_at_once(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        """The most embeddings that the encoder computes at once: those of an image, or of some frames of a video."""
        return self._vision.most_at_once(kind, options)


def frame_seconds(video: Video) -> float:
    """The mean time between two frames; 0 for a single frame."""
    between = len(video.times) - 1
    return float(video.times[-1] - video.times[0]) / between if between > 0 else 0.0
