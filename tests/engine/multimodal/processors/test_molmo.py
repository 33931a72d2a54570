"""The processor of Molmo's first generation against a slow, plain one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.errors import ModelError, RequestError
from engine.model.molmo.configuration import MolmoConfig
from engine.multimodal.processors import molmo
from engine.multimodal.processors.crops import CropSettings, kept_cells, select_tiling, tilings

START, END, PATCH, COLUMN = 152064, 152065, 152066, 152067
SETTINGS = CropSettings(336, 14, 4, 4)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


@pytest.fixture
def processor(tmp_path: Path) -> Any:
    return molmo.make(tmp_path, MolmoConfig(qkv_bias=True))


def plain_tiling(height: int, width: int) -> tuple[int, int]:
    """The choice in words: the least enlargement, else the least reduction; fewer crops first, then fewer rows."""
    choices = sorted(
        ((i, j) for i in range(1, 13) for j in range(1, 13) if i * j <= 12), key=lambda t: (t[0] * t[1], t)
    )
    scales = {t: min(224 * t[0] / (height - 112), 224 * t[1] / (width - 112)) for t in choices}
    enlarging = [t for t in choices if scales[t] >= 1]
    return min(enlarging, key=scales.__getitem__) if enlarging else max(choices, key=scales.__getitem__)


def fitted(image: Image.Image, height: int, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The image resized by torch in the middle of a black canvas, normalized; and where it is image."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    scale = min(height / image.height, width / image.width)
    size = int(np.float32(image.height) * np.float32(scale)), int(np.float32(image.width) * np.float32(scale))
    resized = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0].clip(0, 1)
    canvas, inside = np.zeros((height, width, 3)), np.zeros((height, width))
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas[top : top + size[0], left : left + size[1]] = resized.permute(1, 2, 0)
    inside[top : top + size[0], left : left + size[1]] = 1
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    return (canvas - mean) / std, inside


def patches_of(crop: NDArray[Any]) -> NDArray[Any]:
    """[576, …], by rows of patches of 14 pixels."""
    return np.stack([crop[y : y + 14, x : x + 14].reshape(-1) for y in range(0, 336, 14) for x in range(0, 336, 14)])


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900), (64, 64), (1600, 1200), (336, 336), (500, 30)])
def test_equals_the_plain_processor(processor: Any, width: int, height: int) -> None:
    image = picture(width, height)
    found = processor.process("image", image, 1, {})
    rows, columns = plain_tiling(height, width)
    canvas, inside = fitted(image, rows * 224 + 112, columns * 224 + 112)
    crops, masks = [fitted(image, 336, 336)[0]], []
    for i in range(rows):
        for j in range(columns):
            some = np.s_[i * 224 : i * 224 + 336, j * 224 : j * 224 + 336]
            crops.append(canvas[some])
            masks.append(patches_of(inside[some][..., None]).mean(-1))
    masks.append(np.full(576, -1.0))
    np.testing.assert_allclose(found.tensors["images"], [patches_of(crop) for crop in crops], atol=1e-4)
    np.testing.assert_allclose(found.tensors["image_masks"], masks, atol=1e-6)
    high, wide = (rows * 16 + 8) // 2, (columns * 16 + 8) // 2
    expected = [START, *[*[PATCH] * 12, COLUMN] * 12, END, START, *[*[PATCH] * wide, COLUMN] * high, END]
    assert found.tokens == expected


@pytest.mark.parametrize("tiling", [(1, 1), (1, 3), (4, 1), (2, 2), (3, 4)])
def test_each_place_of_the_canvas_has_one_cell(tiling: tuple[int, int]) -> None:
    """A cell of a crop is where its pixels are on the canvas."""
    rows, columns = tiling
    canvas = np.arange((rows * 8 + 4) * (columns * 8 + 4)).reshape(rows * 8 + 4, columns * 8 + 4)
    cells = np.concatenate(
        [canvas[i * 8 : i * 8 + 12, j * 8 : j * 8 + 12].ravel() for i in range(rows) for j in range(columns)]
    )
    order = kept_cells(tiling, 12, 2, 2)
    assert (cells[order] == canvas).all()
    assert order[0, 0] == 0
    assert order[-1, -1] == rows * columns * 144 - 1


def test_order_of_two_crops() -> None:
    """Both keep their half of the strip that they share."""
    order = kept_cells((1, 2), 12, 2, 2)
    assert order.shape == (12, 20)
    assert order[0].tolist() == [*range(10), *range(144 + 2, 144 + 12)]


@pytest.mark.parametrize(
    "size", [(100, 100), (112, 112), (113, 5000), (336, 336), (337, 336), (2000, 40), (9999, 9999)]
)
def test_tilings_of_extreme_sizes(size: tuple[int, int]) -> None:
    rows, columns = select_tiling(*size, SETTINGS, 12)
    assert 1 <= rows * columns <= 12


def test_most_tokens(processor: Any) -> None:
    tallest = processor.process("image", picture(336, 2800), 1, {})
    assert processor.most_tokens("image", {}) == len(tallest.tokens) == 2 + 12 * 13 + 2 + 100 * 13
    sizes = [SETTINGS.canvas(tiling) for tiling in tilings(3)]
    longest = max(len(processor.process("image", picture(w, h), 1, {"max_crops": 3}).tokens) for h, w in sizes)
    assert processor.most_tokens("image", {"max_crops": 3}) == longest


def test_fewer_crops(processor: Any) -> None:
    found = processor.process("image", picture(900, 900), 1, {"max_crops": 1})
    assert len(found.tensors["images"]) == 2
    with pytest.raises(RequestError, match="max_crops must be an integer from 1 to 12, not 13"):
        processor.process("image", picture(90, 90), 1, {"max_crops": 13})
    with pytest.raises(RequestError, match="no option 'crops'; it has max_crops"):
        processor.process("image", picture(90, 90), 1, {"crops": 1})


def test_image_that_is_too_narrow(processor: Any) -> None:
    with pytest.raises(RequestError, match="1x10000 pixels is too narrow"):
        processor.process("image", Image.new("RGB", (1, 10000)), 1, {})
    assert processor.process("image", Image.new("RGB", (1, 1)), 1, {}).tensors["images"].shape == (2, 576, 588)


def test_options_of_the_folder(tmp_path: Path) -> None:
    fields = {"max_crops": 4, "overlap_margins": [2, 2], "base_image_input_size": [336, 336], "image_mean": [0, 0, 0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    made = molmo.make(tmp_path, MolmoConfig(qkv_bias=True))
    found = made.process("image", picture(900, 900), 1, {})
    assert len(found.tensors["images"]) == 5
    assert found.tensors["images"].min() >= 0
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields | {"image_patch_size": 16}))
    with pytest.raises(ModelError, match="patches of 16, the model takes 336 and 14"):
        molmo.make(tmp_path, MolmoConfig(qkv_bias=True))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields | {"overlap_margins": [3, 3]}))
    with pytest.raises(ModelError, match="overlap_margins 3 and 3 must be even"):
        molmo.make(tmp_path, MolmoConfig(qkv_bias=True))


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    added = [{"id": START, "content": "<im_start>"}, {"id": 7, "content": "<im_patch>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    with pytest.raises(ModelError, match=r"<im_patch> is token 7 in tokenizer.json, but 152066"):
        molmo.make(tmp_path, MolmoConfig(qkv_bias=True))
