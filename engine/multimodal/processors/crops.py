"""How Molmo's processors divide an image: crops that overlap, and the image as a whole in the size of one crop.

Two crops side by side share a strip of two margins; each keeps its half of it (`left` and `right` are the margins):

    crop 0   |............|right|
    crop 1                |left |............|
             |<- window + left ->|<- window + right ->|
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CropSettings:
    """Sizes of crops.

    Args:
        size: pixels of a crop, in each direction.
        patch: pixels of a patch.
        left, right: patches of a crop's margins, at its top and left and at its bottom and right.
    """

    size: int
    patch: int
    left: int
    right: int

    @property
    def patches(self) -> int:
        """Patches of a crop, in each direction."""
        return self.size // self.patch

    @property
    def window(self) -> int:
        """Pixels from one crop to the next."""
        return (self.patches - self.left - self.right) * self.patch

    @property
    def margins(self) -> int:
        """Pixels of both margins."""
        return (self.left + self.right) * self.patch

    def canvas(self, tiling: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the image that is divided into so many rows and columns of crops."""
        return tiling[0] * self.window + self.margins, tiling[1] * self.window + self.margins


def tilings(most_crops: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of at most that many crops, those with the fewest crops first."""
    found = [(i, j) for i in range(1, most_crops + 1) for j in range(1, most_crops // i + 1)]
    yield from sorted(found, key=lambda one: (one[0] * one[1], one[0]))


def select_tiling(height: int, width: int, settings: CropSettings, most_crops: int) -> tuple[int, int]:
    """Rows and columns of crops for an image: the least enlargement, else the least reduction.

    An image that is smaller than the margins has one crop. The arithmetic is float32, as in training.
    """
    choices = list(tilings(most_crops))
    size = np.array([height - settings.margins, width - settings.margins], dtype=np.float32)
    with np.errstate(divide="ignore"):
        scales = (np.array(choices, dtype=np.float32) * np.float32(settings.window) / size).min(-1)
    if (scales < 1).all():
        return choices[int(scales.argmax())]
    return choices[int(np.where(scales < 1, np.inf, scales).argmin())]


def cut_patches(pixels: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
    """[crops, height, width, channels] to [crops, patches, patch · patch · channels], by rows."""
    crops, height, width, channels = pixels.shape
    split = pixels.reshape(crops, height // patch, patch, width // patch, patch, channels)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 2, 4, 5)).reshape(crops, -1, patch * patch * channels)


def cut_crops(
    canvas: NDArray[np.generic], tiling: tuple[int, int], settings: CropSettings
) -> list[NDArray[np.generic]]:
    """The crops of a canvas [height, width, …], by rows."""
    step, size = settings.window, settings.size
    return [
        canvas[i * step : i * step + size, j * step : j * step + size]
        for i in range(tiling[0])
        for j in range(tiling[1])
    ]


def kept_cells(tiling: tuple[int, int], side: int, left: int, right: int) -> Int64s:
    """The cells of all crops that are kept, in their places on the canvas: int64[rows, columns].

    A cell's number counts the cells of all crops, `side` · `side` each. Margins of neighbors are left out.
    """
    rows, columns = tiling
    numbers = np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
    step = side - left - right

    def ranges(count: int) -> list[tuple[int, int, int]]:
        first, last = 0, count - 1
        return [(i, 0 if i == first else left, side if i == last else left + step) for i in range(count)]

    return np.concatenate(
        [
            np.concatenate([numbers[i, j, top:bottom, start:end] for j, start, end in ranges(columns)], axis=1)
            for i, top, bottom in ranges(rows)
        ],
        axis=0,
    )
