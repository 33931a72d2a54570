"""LLaVA 1.5's tokens and pixels equal those of transformers' processor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import ModelError, RequestError
from engine.multimodal.processors import llava
from tests.engine.multimodal.llava_configs import IMAGE, ODD_SIZES, config_of, noise, tokenizer, write_options

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}, "crop_size": 28}


def reference(folder: Path, **options: Any) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil.from_pretrained(folder)
    return LlavaProcessor(images, tokenizer(), patch_size=7, num_additional_image_tokens=1, **options)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_equals_transformers(tmp_path: Path, size: tuple[int, int], strategy: str) -> None:
    write_options(tmp_path, **CLIP)
    ours = llava.make(tmp_path, config_of("llava", vision_feature_select_strategy=strategy))
    found = ours.process("image", noise(*size), 1, {})
    whole = reference(tmp_path, vision_feature_select_strategy=strategy)
    expected = whole(images=noise(*size), text="<image>", return_tensors="np")
    assert found.tokens == expected["input_ids"][0].tolist()
    assert np.array_equal(found.tensors["pixel_values"], expected["pixel_values"])
    assert ours.most_tokens("image", {}) == len(found.tokens)


def test_defaults_without_a_file(tmp_path: Path) -> None:
    write_options(tmp_path, **CLIP)
    with_file, without = (llava.make(folder, config_of("llava")) for folder in (tmp_path, tmp_path / "model.json"))
    a, b = (one.process("image", noise(33, 57), 1, {}) for one in (with_file, without))
    assert a.tokens == b.tokens == [IMAGE] * 16
    assert np.array_equal(a.tensors["pixel_values"], b.tensors["pixel_values"])


def test_siglip_tower_without_a_file(tmp_path: Path) -> None:
    found = llava.make(tmp_path, config_of("llava-siglip")).process("image", noise(33, 57), 1, {})
    assert found.tokens == [IMAGE] * 16
    assert found.tensors["pixel_values"].shape == (1, 3, 28, 28)
    assert abs(found.tensors["pixel_values"]).max() <= 1.0


def test_options_in_processor_config(tmp_path: Path) -> None:
    (tmp_path / "processor_config.json").write_text(
        '{"image_processor": {"do_normalize": false, "crop_size": 28, "size": 28}}'
    )
    pixels = llava.make(tmp_path, config_of("llava")).process("image", noise(30, 30), 1, {}).tensors["pixel_values"]
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_options_of_a_request(tmp_path: Path) -> None:
    ours = llava.make(tmp_path, config_of("llava"))
    plain = ours.process("image", noise(30, 30), 1, {"do_normalize": False}).tensors["pixel_values"]
    assert 0 <= plain.min() <= plain.max() <= 1
    assert ours.process("image", noise(30, 30), 1, {}).tensors["pixel_values"].min() < 0


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"max_pixels": 9}, "no option 'max_pixels'; it has crop_size"),
        ({"crop_size": {"height": 14, "width": 14}}, "images of 14x14 pixels; the model takes 28x28 only"),
        ({"size": {"height": 100_000, "width": 100_000}}, "10000000000 pixels"),
        ({"do_resize": "perhaps"}, "can't take an image of 30x30 pixels"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], cause: str) -> None:
    ours = llava.make(tmp_path, config_of("llava"))
    with pytest.raises(RequestError, match=cause):
        ours.process("image", noise(30, 30), 1, options)


def test_an_image_that_would_grow_too_much(tmp_path: Path) -> None:
    ours = llava.make(tmp_path, config_of("llava"))
    with pytest.raises(RequestError, match="1x90000 pixels would have 70560000 pixels"):
        ours.process("image", noise(1, 90_000), 1, {})


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "can't be read"),
        ("[]", "not a JSON object"),
        ('{"image_processor_type": "NoSuchProcessor"}', "no NoSuchProcessor that works with PIL"),
        ('{"size": {"sideways": 3}}', "can't be used"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelError, match=cause):
        llava.make(tmp_path, config_of("llava"))
