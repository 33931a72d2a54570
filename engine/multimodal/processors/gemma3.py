"""Images of Gemma 3: one size for all, and crops of long images where `do_pan_and_scan` asks for them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import RequestError
from engine.multimodal.processors.image_processor import OPTIONS, ImageProcessor, load_image_processor
from engine.multimodal.processors.kinds import require_image
from engine.multimodal.processors.texts import text_encoder
from engine.multimodal.types import MediaKind, Processed, Processor

# These replace what the folder of the image processor declares, as in transformers.
PAN_AND_SCAN: dict[str, Any] = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
CROP_OPTION, MOST_CROPS = "pan_and_scan_max_num_crops", 16
AROUND = "\n\n"
WHOLE, CROPS = "Here is the original image ", " and here are some crops to help you see better "


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a Gemma3ForConditionalGeneration."""
    side = hf_config.vision_config.image_size
    images = load_image_processor(folder, "Gemma3ImageProcessor", {"size": {"height": side, "width": side}})
    return Gemma3Processor(images, text_encoder(folder), hf_config)


class Gemma3Processor:
    """The image as start, embeddings and end, with line breaks around.

    With crops, of which each is written as an image as well:

        Here is the original image [image] and here are some crops to help you see better [image] [image]
    """

    def __init__(self, images: ImageProcessor, encode: Callable[[str], list[int]], hf_config: Any):
        self._images = images
        self._encode = encode
        self._side: int = hf_config.vision_config.image_size
        image = [hf_config.image_token_index] * hf_config.mm_tokens_per_image
        self._tokens: list[int] = [hf_config.boi_token_index, *image, hf_config.eoi_token_index]

    def process(self, kind: MediaKind, media: Any, count: int, options: Mapping[str, Any]) -> Processed:  # noqa: ARG002
        """See `Processor`."""
        require_image(kind)
        self._most_crops(options)
        found = self._images(media, {**PAN_AND_SCAN, "do_convert_rgb": True, **options})
        pixels, crops = found["pixel_values"], int(found["num_crops"][0])
        if pixels.shape[-2:] != (self._side, self._side):
            height, width = pixels.shape[-2:]
            raise RequestError(
                f"these options make images of {width}x{height} pixels; the model takes {self._side}x{self._side} only",
                OPTIONS,
            )
        before = (WHOLE if crops else "") + AROUND
        return Processed(self._with_crops(crops), {"pixel_values": pixels}, before=before, after=AROUND)

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:  # noqa: ARG002
        """See `Processor`."""
        merged = {**PAN_AND_SCAN, **options}
        return len(self._with_crops(self._most_crops(options) if merged["do_pan_and_scan"] else 0))

    def _with_crops(self, crops: int) -> list[int]:
        tokens = list(self._tokens)
        for number in range(crops):
            tokens += self._encode(AROUND + (CROPS if number == 0 else " ") + AROUND) + self._tokens
        return tokens

    def _most_crops(self, options: Mapping[str, Any]) -> int:
        most = {**PAN_AND_SCAN, **options}[CROP_OPTION]
        if not isinstance(most, int) or not 1 <= most <= MOST_CROPS:
            raise RequestError(f"{CROP_OPTION} must be from 1 to {MOST_CROPS}, not {most!r}", OPTIONS)
        return most
