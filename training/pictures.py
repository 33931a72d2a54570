"""The pictures and questions of the package `easy-vqa`, and the random pictures made of them for training.

A picture shows one shape of one color on a light background of one color, 64 × 64 pixels.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SIZE = 64
UNKNOWN = -100
"""Label of a picture whose questions don't tell its shape or its color; the loss functions of torch ignore it."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question of the data set.

    Attributes:
        picture: index of its picture in `Split.pictures`.
    """

    text: str
    answer: str
    picture: int


@dataclass(frozen=True, slots=True)
class Split:
    """Half of the data set: "train" or "test".

    Attributes:
        pictures: [pictures, 64, 64, 3], RGB, 0 to 255.
        files: the PNG file of each picture.
        shapes, colors: [pictures], indices in SHAPES and COLORS, or UNKNOWN.
    """

    pictures: np.ndarray
    files: list[Path]
    questions: list[Question]
    shapes: np.ndarray
    colors: np.ndarray


def load(name: str) -> Split:
    """Read a split of the installed package. Raises SystemExit with the command that installs it."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise SystemExit("the pictures are missing: pip install easy-vqa")
    folder = Path(spec.origin).parent / "data" / name
    questions = [Question(*entry) for entry in json.loads((folder / "questions.json").read_text())]
    files = [folder / "images" / f"{index}.png" for index in range(1 + max(q.picture for q in questions))]
    pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    shapes, colors = labels(questions, len(files))
    return Split(pictures, files, questions, shapes, colors)


def labels(questions: list[Question], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Shape and color of each picture, as far as its questions and answers tell them."""
    shapes, colors = np.full(count, UNKNOWN), np.full(count, UNKNOWN)
    for question in questions:
        for name in _facts(question):
            if name in SHAPES:
                shapes[question.picture] = SHAPES.index(name)
            else:
                colors[question.picture] = COLORS.index(name)
    return shapes, colors


def _facts(question: Question) -> list[str]:
    words = question.text.rstrip("?").split()
    named = [word for word in words if word in SHAPES or word in COLORS]
    if question.answer in ("yes", "no"):
        negated = "not" in words or "no" in words
        return named if (question.answer == "yes") != negated else []
    return [*named, question.answer]


@dataclass(frozen=True, slots=True)
class Scenes:
    """Random pictures and where their shapes are.

    Attributes:
        pictures: [n, 64, 64, 3].
        masks: [n, 64, 64], True where the shape is.
    """

    pictures: np.ndarray
    masks: np.ndarray

    def coverage(self, patch: int) -> np.ndarray:
        """Fraction of each patch that the shape covers: [n, patches], row by row."""
        grid = SIZE // patch
        share: np.ndarray = self.masks.reshape(-1, grid, patch, grid, patch).mean((2, 4)).reshape(len(self.masks), -1)
        return share.astype(np.float32)

    def geometry(self) -> np.ndarray:
        """Height, width, filled part of its box, and center of each shape, scaled to about -1 to 1: [n, 5]."""
        rows, columns = self.masks.any(2), self.masks.any(1)
        height, width, area = rows.sum(1), columns.sum(1), self.masks.sum((1, 2))
        at = np.arange(SIZE)
        center = [(line * at).sum(1) / line.sum(1) * 2 / SIZE - 1 for line in (rows, columns)]
        filled = 2 * np.log(area / (height * width))
        return np.stack([np.log(height / 16), np.log(width / 16), filled, *center], 1).astype(np.float32)


class SceneMaker:
    """Makes random pictures of those of a split: its shape at a random place, on the background of another picture.

    Args:
        pictures: [pictures, 64, 64, 3].
    """

    def __init__(self, pictures: np.ndarray) -> None:
        self._backgrounds = np.stack([_background(picture) for picture in pictures])
        self._crops = [_crop(*pair) for pair in zip(pictures, self._backgrounds, strict=True)]

    def make(self, indices: np.ndarray, random: np.random.Generator) -> Scenes:
        """Random pictures of the shapes in `indices`."""
        canvas = self._backgrounds[random.integers(len(self._backgrounds), size=len(indices))]
        pictures = np.broadcast_to(canvas[:, None, None], (len(indices), SIZE, SIZE, 3)).copy()
        masks = np.zeros((len(indices), SIZE, SIZE), dtype=bool)
        for row, index in enumerate(indices):
            pixels, mask = self._crops[index]
            if random.random() < 0.5:
                pixels, mask = pixels[:, ::-1], mask[:, ::-1]
            height, width = mask.shape
            top, left = random.integers(SIZE - height + 1), random.integers(SIZE - width + 1)
            place = row, slice(top, top + height), slice(left, left + width)
            pictures[place][mask] = pixels[mask]
            masks[place] = mask
        return Scenes(pictures, masks)


def _background(picture: np.ndarray) -> np.ndarray:
    """The most frequent color of the picture's border."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    colors, counts = np.unique(border, axis=0, return_counts=True)
    color: np.ndarray = colors[counts.argmax()]
    return color


def _crop(picture: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rectangle around the shape, and which of its pixels belong to the shape."""
    mask = (picture != background).any(axis=-1)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return picture[box], mask[box]
