"""Images of Idefics3 and SmolVLM: tiles of one size by rows and columns, then the whole image in that size."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import ModelError
from engine.multimodal.processors.image_processor import ImageProcessor, load_image_processor
from engine.multimodal.processors.kinds import require_image
from engine.multimodal.processors.texts import text_encoder
from engine.multimodal.types import MediaKind, Processed

AROUND, WHOLE, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"
MOST_PIXELS_A_SIDE = 4096  # to which transformers' class resizes
MOST_TILES_A_SIDE = 4  # transformers' default


def make(folder: Path, hf_config: Any) -> "Idefics3Processor":
    """The processor of an Idefics3ForConditionalGeneration, and of images of a SmolVLMForConditionalGeneration."""
    side: int = hf_config.vision_config.image_size
    defaults = {"size": {"longest_edge": MOST_TILES_A_SIDE * side}, "max_image_size": {"longest_edge": side}}
    images = load_image_processor(folder, "SmolVLMImageProcessor", defaults)
    tile = dict(images.inner.max_image_size).get("longest_edge")
    if tile != side:
        raise ModelError(f"{folder}: max_image_size must be the {side} pixels of the vision tower, not {tile}")
    return Idefics3Processor(images, text_encoder(folder), hf_config)


class Idefics3Processor:
    """Each tile after its row and column, the whole image at the end; an image of one tile is the whole image alone."""

    def __init__(self, images: ImageProcessor, encode: Callable[[str], list[int]], hf_config: Any):
        vision = hf_config.vision_config
        self.images = images
        self._encode = encode
        self._token: int = hf_config.image_token_id
        self._tile = {"longest_edge": vision.image_size}
        self.per_tile: int = (vision.image_size // vision.patch_size) ** 2 // hf_config.scale_factor**2

    def process(self, kind: MediaKind, media: Any, count: int, options: Mapping[str, Any]) -> Processed:  # noqa: ARG002
        """See `Processor`."""
        require_image(kind)
        found = self.images(media, options, max_image_size=self._tile, do_pad=True, return_row_col_info=True)
        pixels = found["pixel_values"][0]
        rows, columns = (int(found[name][0][0]) for name in ("rows", "cols"))
        tokens = self._tokens(rows, columns)
        if tokens.count(self._token) != len(pixels) * self.per_tile:
            raise ModelError(
                f"the tokenizer has another id for {IMAGE} than image_token_id in config.json, {self._token}"
            )
        return Processed(tokens, {"pixel_values": pixels})

    def most_tokens(self, kind: MediaKind, options: Mapping[str, Any]) -> int:  # noqa: ARG002
        """See `Processor`."""
        inner = self.images.inner
        if not options.get("do_image_splitting", inner.do_image_splitting):
            return len(self._tokens(0, 0))
        longest = min(int(dict(options.get("size", inner.size)).get("longest_edge") or 0), MOST_PIXELS_A_SIDE)
        tiles = -(-longest // self._tile["longest_edge"])
        return len(self._tokens(tiles, tiles)) if tiles > 1 else len(self._tokens(0, 0))

    def _tokens(self, rows: int, columns: int) -> list[int]:
        found = self._encode(tiles_text(rows, columns, self.per_tile))
        # A folder without a tokenizer has no tokens for rows and columns.
        return found or [self._token] * ((rows * columns + 1) * self.per_tile)


def tiles_text(rows: int, columns: int, per_tile: int) -> str:
    """The text of an image; every IMAGE in it stands for an embedding."""
    lines = [
        "".join(f"{AROUND}<row_{row}_col_{column}>{IMAGE * per_tile}" for column in range(1, columns + 1))
        for row in range(1, rows + 1)
    ]
    tiles = "".join(f"{line}\n" for line in lines) + "\n" if lines else ""
    return f"{tiles}{AROUND}{WHOLE}{IMAGE * per_tile}{AROUND}"
