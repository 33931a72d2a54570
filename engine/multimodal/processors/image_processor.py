"""The image processors of transformers that need PIL and numpy alone, with the options of a model's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from engine.errors import ModelError, RequestError
from engine.text import first_line

# Either may have the options; processor_config.json wins, as in transformers.
NESTED, OWN = ("processor_config.json", "image_processor"), "preprocessor_config.json"
PIL_SUFFIX = "Pil"
OPTIONS = "mm_processor_kwargs"
# An image may grow before it is cropped or shrunk: 1 x 10000 pixels with the short edge resized to 336 are 10^9 pixels.
MOST_PIXELS = 1 << 26


class ImageProcessor:
    """Calls one image processor of transformers for single images.

    `inner` is an instance of a class with PIL's backend.
    """

    def __init__(self, inner: Any):
        self.inner: Any = inner

    def __call__(
        self, image: Image, options: Mapping[str, Any], *, images: Any = None, **fixed: Any
    ) -> dict[str, NDArray[Any]]:
        """The processor's tensors for one image.

        Raises RequestError for an option or an image that the processor doesn't take.

        Args:
            image: in RGB.
            options: those of the request; they replace the folder's.
            images: what transformers' processor is called with, if not the image alone.
            fixed: options that a request can't change.
        """
        names = self.inner.valid_kwargs.__annotations__.keys() - fixed.keys()
        unknown = sorted(options.keys() - names)
        if unknown:
            own = ", ".join(sorted(names))
            raise RequestError(f"the model's image processor has no option {unknown[0]!r}; it has {own}", OPTIONS)
        try:
            self._check_growth(image, options)
            found = self.inner.preprocess(images or image, **{**options, **fixed, "return_tensors": "np"})
        except RequestError:
            raise
        except Exception as error:  # its checks raise errors of many kinds
            size = f"{image.width}x{image.height}"
            cause = f"the model's image processor can't take an image of {size} pixels: {first_line(error)}"
            raise RequestError(cause, OPTIONS if options else None) from error
        return {name: np.ascontiguousarray(value) for name, value in found.items()}

    def _check_growth(self, image: Image, options: Mapping[str, Any]) -> None:
        size = options.get("size", self.inner.size)
        size = {"shortest_edge": size} if isinstance(size, int) else dict(size or {})
        short, long = sorted(image.size)
        if "height" in size and "width" in size:
            check_pixels(image, size["width"], size["height"])
        elif "shortest_edge" in size and "longest_edge" not in size:
            check_pixels(image, size["shortest_edge"], size["shortest_edge"] * long // short)


def check_pixels(image: Image, width: int, height: int) -> None:
    """Raise RequestError if an image would have more than MOST_PIXELS while it is processed."""
    if width * height > MOST_PIXELS:
        raise RequestError(
            f"an image of {image.width}x{image.height} pixels would have {width * height} pixels while the model's "
            f"image processor resizes it; the most is {MOST_PIXELS}: send an image with a smaller ratio of its sides"
        )


def load_image_processor(folder: Path, default: str, defaults: Mapping[str, Any]) -> ImageProcessor:
    """The image processor of a model.

    Raises ModelError if the folder's options can't be read, or name a class that doesn't exist for PIL.

    Args:
        folder: the model's folder.
        default: transformers' class, without its suffix for PIL, if the folder names none.
        defaults: its options if the folder has none (a model of dummy weights has only a config).
    """
    fields = read_options(folder)
    options = dict(defaults) if fields is None else fields
    name = str(options.pop("image_processor_type", None) or default)
    for suffix in ("Fast", PIL_SUFFIX):
        name = name.removesuffix(suffix)
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    found: Any = get_image_processor_class_from_name(name + PIL_SUFFIX)
    if found is None or getattr(found, "is_dummy", False):
        raise ModelError(f"{folder}: transformers has no {name} that works with PIL ({OWN})")
    try:
        return ImageProcessor(found(**options))
    except Exception as error:  # its checks raise errors of many kinds
        raise ModelError(f"{folder}: {OWN} can't be used: {first_line(error)}") from error


def read_options(folder: Path) -> dict[str, Any] | None:
    """The fields of the folder's image processor; None if it has none."""
    nested, part = NESTED
    whole = _read_object(folder / nested)
    if whole is not None and isinstance(whole.get(part), dict):
        return dict(whole[part])
    return _read_object(folder / OWN)


def read_processor_options(folder: Path) -> dict[str, Any]:
    """The fields of processor_config.json other than the image processor's; empty without that file."""
    nested, part = NESTED
    return {name: value for name, value in (_read_object(folder / nested) or {}).items() if name != part}


def _read_object(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from error
    return found
