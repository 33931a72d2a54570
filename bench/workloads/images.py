"""Chats about synthetic images of given sizes: load of images without a data set."""

import io
import re
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.workloads.base import RequestSpec
from bench.workloads.fields import Length, draw, length, length_field, length_text, repeat_share
from bench.workloads.pictures import data_url, mark

FORMATS = ("jpeg", "png")
MOST_SIDE = 16_384  # pixels
_MOTIFS = 8  # different images of each size; every sent image also has a mark of its own
# Of a motif: blurred squares per side; levels of noise and pixels per cell of it, so that files have realistic sizes.
_GRID, _NOISE, _CELL = 24, 6, 4
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
# About one token each in all common vocabularies.
_WORDS = [
    "what", "where", "when", "which", "who", "how", "many", "color", "shape", "large", "small", "left", "right",
    "above", "below", "near", "under", "front", "image", "photo", "picture", "room", "street", "table", "chair",
    "person", "animal", "water", "light", "shadow", "line", "number", "word", "text", "paper", "book", "tree",
]  # fmt: skip


class SyntheticImages:
    """Each request has `images` images with sizes drawn from `image_size`, and about `input` tokens of random words.

    `repeat` % of requests repeat an earlier one, to measure caches.
    """

    kind = "images"

    def __init__(
        self,
        *,
        images: Length = 1,
        image_size: str | list[str] = "512x512",
        input: Length = 64,
        output: Length = 64,
        image_format: str = "jpeg",
        repeat: int = 0,
    ):
        self._images = length("images", images)
        self._sizes = parse_sizes(image_size)
        self._input = length("input", input)
        self._output = length("output", output)
        if image_format not in FORMATS:
            raise BenchError(f"workload: image_format must be one of {', '.join(FORMATS)}, not {image_format!r}")
        self._format = image_format
        self._repeat = repeat_share(repeat)

    @property
    def name(self) -> str:
        sizes = ",".join(f"{width}x{height}" for width, height in self._sizes)
        lengths = f"{length_text(self._input)}/{length_text(self._output)}"
        repeated = f" repeat {self._repeat}%" if self._repeat else ""
        return f"images {length_text(self._images)} x {sizes} {lengths}{repeated}"

    @property
    def max_tokens(self) -> int:
        """An upper estimate: a token for each 14 x 14 pixels, as models without a limit on the resolution have."""
        most = max(-(-width // 14) * -(-height // 14) for width, height in self._sizes)
        return self._input[1] + self._images[1] * most + self._output[1]

    def notes(self) -> list[str]:
        return []

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "images": length_field(self._images),
            "image_size": [f"{width}x{height}" for width, height in self._sizes],
            "input": length_field(self._input),
            "output": length_field(self._output),
            "image_format": self._format,
            "repeat": self._repeat,
        }

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        motifs = {size: [_motif(rng, *size) for _ in range(_MOTIFS)] for size in self._sizes}
        specs: list[RequestSpec] = []
        for i in range(count):
            output = draw(rng, self._output)
            if repeats(i, self._repeat, first=not specs):
                earlier = specs[int(rng.integers(len(specs)))]
                specs.append(RequestSpec(earlier.input_tokens, output, messages=earlier.messages))
                continue
            specs.append(self._request(rng, motifs, f"{seed}-{i}", output))
        return specs

    def _request(
        self, rng: np.random.Generator, motifs: dict[tuple[int, int], list[Any]], salt: str, output: int
    ) -> RequestSpec:
        content: list[dict[str, Any]] = []
        for number in range(draw(rng, self._images)):
            motif = motifs[self._sizes[int(rng.integers(len(self._sizes)))]][int(rng.integers(_MOTIFS))]
            url = data_url(self._encode(motif.copy(), f"{salt}-{number}"))
            content.append({"type": "image_url", "image_url": {"url": url}})
        words = draw(rng, self._input)
        text = " ".join(_WORDS[k] for k in rng.integers(len(_WORDS), size=words))
        content.append({"type": "text", "text": text})
        return RequestSpec(words, output, messages=[{"role": "user", "content": content}])

    def _encode(self, picture: Any, salt: str) -> bytes:
        mark(picture, salt)
        out = io.BytesIO()
        if self._format == "png":
            picture.save(out, "PNG", compress_level=1)
        else:
            picture.save(out, "JPEG", quality=90)
        return out.getvalue()


def repeats(index: int, percent: int, *, first: bool) -> bool:
    """Whether a request repeats an earlier one: spread evenly, so that the share is right for any number of requests.

    `first`: there is no earlier request.
    """
    return not first and (index + 1) * percent // 100 > index * percent // 100


def parse_sizes(given: str | list[str]) -> list[tuple[int, int]]:
    """Sizes as width and height in pixels, of "512x512,1275x1650" or a list; raises BenchError."""
    texts = given.split(",") if isinstance(given, str) else given
    sizes = []
    for text in texts if isinstance(texts, list) else ():
        found = _SIZE.fullmatch(str(text).strip())
        sides = (int(found[1]), int(found[2])) if found else (0, 0)
        if not all(1 <= side <= MOST_SIDE for side in sides):
            raise BenchError(
                f"workload: image_size must be WIDTHxHEIGHT, each from 1 to {MOST_SIDE}, not {text!r} (--image-size)"
            )
        sizes.append(sides)
    if not sizes:
        raise BenchError(f"workload: image_size must be WIDTHxHEIGHT or a list of them, not {given!r} (--image-size)")
    return sizes


def _motif(rng: np.random.Generator, width: int, height: int) -> Any:
    """An image of blurred squares in random colors, with noise."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (_GRID, _GRID, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR), dtype=np.int16)
    cells = rng.integers(-_NOISE, _NOISE + 1, (-(-height // _CELL), -(-width // _CELL), 1), dtype=np.int16)
    noise = cells.repeat(_CELL, 0).repeat(_CELL, 1)[:height, :width]
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
