"""Pixtral's pixels equal those of transformers' image processor, its tokens the published rule.

transformers' processor can't be made without torchvision.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ModelError, RequestError
from engine.multimodal.processors import llava, pixtral
from tests.engine.multimodal.llava_configs import IMAGE, config_of, noise, tokenizer, write_options

SIZES = [(1, 1), (50, 40), (1, 60), (60, 1), (64, 64), (65, 3), (512, 300), (8, 9)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "edge"), [("pixtral", 4), ("mistral3", 8)])
@pytest.mark.parametrize("has_file", [True, False])
def test_equals_transformers(tmp_path: Path, size: tuple[int, int], kind: str, edge: int, has_file: bool) -> None:
    from transformers import PixtralImageProcessorPil

    if has_file:
        write_options(tmp_path, image_processor_type="PixtralImageProcessor", patch_size=4, size={"longest_edge": 64})
    ours = pixtral.make(tmp_path, config_of(kind))
    found = ours.process("image", noise(*size), 1, {})
    inner = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": edge, "width": edge})
    expected = inner(noise(*size), return_tensors="np")
    assert np.array_equal(found.tensors["pixel_values"], expected["pixel_values"])
    height, width = expected["image_sizes"][0]
    row = [IMAGE] * (width // edge)
    assert found.tokens == [*([*row, 12] * (height // edge - 1)), *row, 13]
    assert len(found.tokens) <= ours.most_tokens("image", {})


def test_the_largest_image(tmp_path: Path) -> None:
    ours = pixtral.make(tmp_path, config_of("pixtral"))
    assert len(ours.process("image", noise(64, 64), 1, {}).tokens) == ours.most_tokens("image", {}) == 16 * 17


def test_options_of_a_request(tmp_path: Path) -> None:
    ours = pixtral.make(tmp_path, config_of("pixtral"))
    options = {"size": {"longest_edge": 32}}
    assert len(ours.process("image", noise(64, 64), 1, options).tokens) == ours.most_tokens("image", options) == 8 * 9
    with pytest.raises(RequestError, match="multiples of 4 up to 64"):
        ours.process("image", noise(640, 640), 1, {"size": {"longest_edge": 128}})
    with pytest.raises(RequestError, match="no option 'patch_size'"):
        ours.process("image", noise(64, 64), 1, {"patch_size": 8})


def test_a_narrow_image(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="an image of 1x1000 pixels is too narrow"):
        pixtral.make(tmp_path, config_of("pixtral")).process("image", noise(1, 1000), 1, {})


def test_llava_with_a_pixtral_tower(tmp_path: Path) -> None:
    config = config_of("pixtral")
    found, expected = (one.make(tmp_path, config).process("image", noise(9, 9), 1, {}) for one in (llava, pixtral))
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_ids_of_the_tokenizer(tmp_path: Path, file: str) -> None:
    (tmp_path / "whole").mkdir()
    tokenizer().save_pretrained(tmp_path / "whole")
    if file == "tokenizer.json":
        (tmp_path / "whole" / file).rename(tmp_path / file)
    else:
        entry = {"content": "[IMG_BREAK]"}, {"content": "[IMG_END]"}
        (tmp_path / file).write_text(json.dumps({"added_tokens_decoder": {"6": entry[0], "7": entry[1]}}))
    assert pixtral.make(tmp_path, config_of("pixtral")).process("image", noise(8, 8), 1, {}).tokens == [
        5,
        5,
        6,
        5,
        5,
        7,
    ]


@pytest.mark.parametrize("fields", [{"image_break_token": "[NEW_LINE]"}, {"image_end_token": "[STOP]"}])
def test_a_tokenizer_without_the_tokens(tmp_path: Path, fields: dict[str, Any]) -> None:
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(fields))
    with pytest.raises(
        ModelError, match=f"the tokenizer has no token {next(iter(fields.values()))}".replace("[", r"\[")
    ):
        pixtral.make(tmp_path, config_of("pixtral"))
