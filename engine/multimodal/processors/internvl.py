"""Images of InternVL: tiles of one size in a grid chosen by the sides' ratio, then the whole image. Videos: frames."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL.Image import Resampling

from engine.errors import ModelError, RequestError
from engine.multimodal.families import FRAMES_AT_ONCE
from engine.multimodal.processors.image_processor import OPTIONS, ImageProcessor, load_image_processor
from engine.multimodal.processors.texts import text_encoder
from engine.multimodal.processors.token_ids import special_token_id
from engine.multimodal.processors.video_frames import VIDEO_FRAMES, VideoFrames, check_size, read_video_options
from engine.multimodal.types import MediaKind, Processed, Processor

TILES = ("min_patches", "max_patches")  # options: the fewest and most tiles
MOST_TILES = 64
FIRST = "Frame1: "  # before the first frame of a video
DIVIDED = {"crop_to_patches": True}  # replaces what the folder of the image processor declares, as in transformers


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of an InternVLForConditionalGeneration."""
    height, width = hf_config.vision_config.image_size
    if height != width:
        raise ModelError(f"a vision tower of {width}x{height} pixels isn't supported; image_size must be a square")
    images = load_image_processor(folder, "GotOcr2ImageProcessor", {"size": {"height": height, "width": width}})
    image: int = hf_config.image_token_id
    start = special_token_id(folder, "<img>", fallback=image - 2)  # as in the vocabulary of InternVL3
    end = special_token_id(folder, "</img>", fallback=image - 1)
    fields = read_video_options(folder)
    check_size(folder, fields, height)
    frames = VideoFrames(images, fields, height, Resampling.BICUBIC)
    return InternVLProcessor(images, frames, text_encoder(folder), hf_config, (start, end))


class InternVLProcessor:
    """As many tokens for each tile, between a start and an end token.

    A frame of a video is like an image of one tile, after its number as text.
    """

    def __init__(
        self,
        images: ImageProcessor,
        frames: VideoFrames,
        encode: Callable[[str], list[int]],
        hf_config: Any,
        around: tuple[int, int],
    ):
        vision = hf_config.vision_config
        self._images = images
        self._frames = frames
        self._encode = encode
        self._side: int = vision.image_size[0]
        self._per_tile = int((self._side // vision.patch_size[0] * hf_config.downsample_ratio) ** 2)
        self._tokens: tuple[int, int, int] = (hf_config.image_token_id, *around)

    def process(self, kind: MediaKind, media: Any, count: int, options: Mapping[str, Any]) -> Processed:  # noqa: ARG002
        """See `Processor`."""
        if kind == "video":
            pixels = self._frames(media, options)
            numbered = [token for i in range(len(pixels)) for token in self._numbered_frame(i)]
            return Processed(numbered, {"pixel_values_videos": pixels}, before=FIRST)
        for name in TILES:
            value = options.get(name, 1)
            if not isinstance(value, int) or not 1 <= value <= MOST_TILES:
                raise RequestError(f"{name} must be from 1 to {MOST_TILES}, not {value!r}", OPTIONS)
        pixels = self._images(media, {**DIVIDED, **options})["pixel_values"]
        if pixels.shape[-2:] != (self._side, self._side):
            height, width = pixels.shape[-2:]
            raise RequestError(
                f"these options make tiles of {width}x{height} pixels; the model takes {self._side}x{self._side} only",
                OPTIONS,
            )
        image, start, end = self._tokens
        return Processed([start, *[image] * (len(pixels) * self._per_tile), end], {"pixel_values": pixels})

    def _numbered_frame(self, index: int) -> list[int]:
        image, start, end = self._tokens
        number = self._encode(f"\nFrame{index + 1}: ") if index else []  # that of the first is text before the video
        return [*number, start, *[image] * self._per_tile, end]

    def most_at_once(self, kind: MediaKind, options: Mapping[str, Any]) -> int:
        """The most embeddings that the encoder computes at once: those of an image, or of some frames of a video."""
        return FRAMES_AT_ONCE * self._per_tile if kind == "video" else self.most_tokens(kind, options)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any], frames: int = VIDEO_FRAMES) -> int:
        """See `Processor`."""
        if kind == "video":
            return sum(len(self._numbered_frame(i)) for i in range(frames))
        divided = {**DIVIDED, **options}["crop_to_patches"]
        tiles = int(options.get(TILES[1], self._images.inner.max_patches)) if divided else 1
        return (tiles + (tiles > 1)) * self._per_tile + 2
