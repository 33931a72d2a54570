"""Images of Pixtral in LLaVA's layout and of Mistral3: of any size, with a token at the end of each row of patches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import RequestError
from engine.multimodal.families import MISTRAL_IMAGES
from engine.multimodal.processors import mistral_images
from engine.multimodal.processors.image_processor import (
    OPTIONS,
    ImageProcessor,
    load_image_processor,
    read_processor_options,
)
from engine.multimodal.processors.token_ids import special_token_id
from engine.multimodal.types import MediaKind, Processed, Processor

# The ids of Mistral's vocabularies with images, where a folder has no tokenizer.
BREAK, END = ("[IMG_BREAK]", 12), ("[IMG_END]", 13)


def make(folder: Path, hf_config: Any) -> Processor:
    """The processor of a model with a Pixtral tower."""
    if getattr(hf_config, MISTRAL_IMAGES, False):
        return mistral_images.make(folder, hf_config)
    vision = hf_config.vision_config
    defaults = {"size": {"longest_edge": vision.image_size}, "patch_size": vision.patch_size}
    images = load_image_processor(folder, "PixtralImageProcessor", defaults)
    named = read_processor_options(folder)
    ids = [
        special_token_id(folder, named.get(field, text), fallback)
        for field, (text, fallback) in (("image_break_token", BREAK), ("image_end_token", END))
    ]
    return PixtralProcessor(images, hf_config, *ids)


class PixtralProcessor:
    """One token for each patch (or square of merged patches), one after each row but the last, and one at the end.

    Of an image of 2 x 3 patches: IMG IMG IMG BREAK IMG IMG IMG END.
    """

    def __init__(self, images: ImageProcessor, hf_config: Any, break_id: int, end_id: int):
        vision = hf_config.vision_config
        self._images = images
        self._most: int = vision.image_size
        self._edge: int = vision.patch_size * getattr(hf_config, "spatial_merge_size", 1)
        self._tokens: tuple[int, int, int] = (hf_config.image_token_index, break_id, end_id)

    def process(
        self,
        kind: MediaKind,  # noqa: ARG002  (images only)
        media: Any,
        count: int,  # noqa: ARG002
        options: Mapping[str, Any],
    ) -> Processed:
        """See `Processor`."""
        short, long = sorted(media.size)
        if long > short * self._most:
            raise RequestError(
                f"an image of {media.width}x{media.height} pixels is too narrow: with the model's longest side of "
                f"{self._most} pixels the other would have less than one"
            )
        square = {"height": self._edge, "width": self._edge}
        pixels = self._images(media, options, patch_size=square)["pixel_values"]
        height, width = pixels.shape[-2:]
        if max(height, width) > self._most or height % self._edge or width % self._edge:
            raise RequestError(
                f"these options make an image of {width}x{height} pixels; the model takes multiples of {self._edge} up "
                f"to {self._most}",
                OPTIONS,
            )
        return Processed(
            grid_tokens(height // self._edge, width // self._edge, *self._tokens), {"pixel_values": pixels}
        )

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:  # noqa: ARG002  (images only)
        """See `Processor`."""
        size = options.get("size", self._images.inner.size)
        longest = size.get("longest_edge") or max(size["height"], size["width"])
        rows = min(-(-longest // self._edge), self._most // self._edge)
        return rows * (rows + 1)


def grid_tokens(rows: int, columns: int, image: int, break_id: int, end_id: int) -> list[int]:
    """The token ids of an image of rows x columns patches."""
    tokens = ([image] * columns + [break_id]) * rows
    tokens[-1] = end_id
    return tokens
