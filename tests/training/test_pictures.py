"""What the questions tell of a picture, and random pictures of a shape."""

import numpy as np
import pytest

from training.pictures import COLORS, SHAPES, SIZE, UNKNOWN, Question, SceneMaker, labels

BACKGROUND, RED = (240, 250, 240), (255, 0, 0)


@pytest.mark.parametrize(
    ("text", "answer", "shape", "color"),
    [
        ("what color is the circle?", "red", "circle", "red"),
        ("what shape does the image contain?", "triangle", "triangle", None),
        ("is there a teal shape?", "yes", None, "teal"),
        ("is there a teal shape?", "no", None, None),
        ("is there not a rectangle in the image?", "no", "rectangle", None),
        ("is no brown shape present?", "no", None, "brown"),
        ("does the image not contain a circle?", "yes", None, None),
    ],
)
def test_an_answer_names_what_a_picture_shows(text: str, answer: str, shape: str | None, color: str | None) -> None:
    shapes, colors = labels([Question(text, answer, 0)], 2)
    assert shapes.tolist() == [UNKNOWN if shape is None else SHAPES.index(shape), UNKNOWN]
    assert colors.tolist() == [UNKNOWN if color is None else COLORS.index(color), UNKNOWN]


def picture(top: int, left: int, height: int, width: int) -> np.ndarray:
    pixels = np.full((SIZE, SIZE, 3), BACKGROUND, dtype=np.uint8)
    pixels[top : top + height, left : left + width] = RED
    return pixels


def test_a_scene_has_the_whole_shape_somewhere() -> None:
    source = np.stack([picture(3, 50, 10, 14), picture(0, 0, 20, 6)])
    scenes = SceneMaker(source).make(np.array([0, 1] * 20), np.random.default_rng(0))
    assert (scenes.pictures[scenes.masks] == RED).all()
    assert (scenes.pictures[~scenes.masks] == BACKGROUND).all()
    assert scenes.masks.sum((1, 2)).tolist() == [140, 120] * 20
    assert len({tuple(np.argwhere(mask)[0]) for mask in scenes.masks}) > 30
    geometry = scenes.geometry()
    np.testing.assert_allclose(geometry[:, 0], np.log(np.array([10, 20] * 20) / 16), rtol=1e-6)
    np.testing.assert_allclose(geometry[:, 1], np.log(np.array([14, 6] * 20) / 16), rtol=1e-6)
    np.testing.assert_allclose(geometry[:, 2], 0, atol=1e-6)


def test_coverage_of_patches() -> None:
    masks = np.zeros((1, SIZE, SIZE), dtype=bool)
    masks[0, 8:16, 16:20] = True
    scenes = SceneMaker(picture(0, 0, 2, 2)[None]).make(np.array([0]), np.random.default_rng(0))
    covered = type(scenes)(scenes.pictures, masks).coverage(8)
    assert covered.shape == (1, 64)
    assert covered[0, 8 + 2] == 0.5
    assert covered.sum() == 0.5
