"""Vision towers whose images all have one size."""

from dataclasses import dataclass
from typing import Any

from engine.errors import ModelError, RequestError
from engine.multimodal.processors.image_processor import OPTIONS

WITH_CLASS_TOKEN = ("clip_vision_model",)


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """The patches of an image in a tower of one size.

    Args:
        size: height and width of the image in pixels.
        patches: rows and columns of patches.
        features: those that the projector gets of one image.
    """

    size: int
    patches: int
    features: int

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise RequestError unless the last two dimensions of pixels are the tower's size."""
        height, width = shape[-2:]
        if (height, width) != (self.size, self.size):
            raise RequestError(
                f"these options make images of {width}x{height} pixels; the model takes {self.size}x{self.size} only",
                OPTIONS,
            )

    def check_tiles(self, shape: tuple[int, ...], tiles: int) -> None:
        """Raise RequestError unless pixels are those of one image and its tiles, in the tower's size."""
        self.check(shape)
        if shape[1] != 1 + tiles:
            raise RequestError(
                f"these options make {shape[1] - 1} tiles of the image; the model takes {tiles}", OPTIONS
            )


def patch_grid(hf_config: Any) -> PatchGrid:
    """The grid of a LLaVA model. With the strategy `default` the model drops the first feature, the class token's."""
    vision = hf_config.vision_config
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise ModelError(
            f"a vision tower of {vision.image_size} pixels with patches of {vision.patch_size} isn't supported; "
            "image_size and patch_size in vision_config must be integers"
        )
    patches = vision.image_size // vision.patch_size
    features = patches * patches + (vision.model_type in WITH_CLASS_TOKEN)
    return PatchGrid(vision.image_size, patches, features - (hf_config.vision_feature_select_strategy == "default"))
