"""A processor without a model, for processes of the pool, which does what the options of an input say."""

import os
import signal
import time
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np

from engine.errors import RequestError
from engine.multimodal.types import Media, Processed, Processor

FACTORY = f"{__name__}:make"
PLACEHOLDER, EMBEDDING = 7, 9  # token ids


class FakeProcessor:
    """Images only: one token for each pixel of the first row."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def process(self, kind: str, media: Any, count: int, options: Mapping[str, Any]) -> Processed:
        assert kind == "image"
        if "sleep" in options:
            time.sleep(options["sleep"])
        if "die" in options:
            os.kill(os.getpid(), signal.SIGKILL)
        if "grow" in options:
            self._kept.append(np.ones(options["grow"] << 20, np.uint8))
        if "refuse" in options:
            raise RequestError("pictures like this are refused", "image_url")
        if "fail" in options:
            raise ZeroDivisionError("by zero")
        pixels = np.asarray(media)
        return Processed([EMBEDDING] * pixels.shape[1], {"pixels": pixels, "count": np.array([count])}, (1, 1, 2))

    def most_tokens(self, kind: str, options: Mapping[str, Any]) -> int:
        return 64


def make(fields: Mapping[str, Any]) -> Processor:
    if "broken" in fields:
        raise OSError("its files are gone")
    return FakeProcessor()


def png(color: int, width: int = 4) -> Media:
    """A picture of one color, as a client sends it."""
    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (width, 2), (color % 256, color // 256, 0)).save(file, "PNG")
    return Media("image", file.getvalue())
