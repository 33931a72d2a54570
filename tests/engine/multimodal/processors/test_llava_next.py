"""LLaVA-NeXT's tokens and tiles equal those of transformers' processor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import RequestError
from engine.multimodal.processors import llava_next
from tests.engine.multimodal.llava_configs import NEXT_GRID, ODD_SIZES, config_of, noise, tokenizer, write_options

FIELDS: dict[str, Any] = {
    "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 28}, "image_grid_pinpoints": NEXT_GRID,
    "crop_size": {"height": 28, "width": 28},
}  # fmt: skip


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("has_file", [True, False])
def test_equals_transformers(tmp_path: Path, size: tuple[int, int], has_file: bool) -> None:
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    if has_file:
        write_options(tmp_path, **FIELDS)
    ours = llava_next.make(tmp_path, config_of("llava_next"))
    found = ours.process("image", noise(*size), 1, {})
    images = LlavaNextImageProcessorPil(**{k: v for k, v in FIELDS.items() if k != "image_processor_type"})
    whole: Any = LlavaNextProcessor(
        images, tokenizer(), patch_size=7, num_additional_image_tokens=1, vision_feature_select_strategy="default"
    )
    expected = whole(images=noise(*size), text="<image>", return_tensors="np")
    assert found.tokens == expected["input_ids"][0].tolist()
    assert found.tensors.keys() == {"pixel_values", "image_sizes"}
    for name, values in found.tensors.items():
        assert np.array_equal(values, expected[name]), name
    assert len(found.tokens) <= ours.most_tokens("image", {}) == 16 + 8 * 9


def test_the_largest_image(tmp_path: Path) -> None:
    ours = llava_next.make(tmp_path, config_of("llava_next"))
    found = ours.process("image", noise(56, 56), 1, {})
    assert len(found.tokens) == ours.most_tokens("image", {})


def test_resolutions_are_the_models(tmp_path: Path) -> None:
    ours = llava_next.make(tmp_path, config_of("llava_next"))
    with pytest.raises(RequestError, match="no option 'image_grid_pinpoints'"):
        ours.process("image", noise(30, 30), 1, {"image_grid_pinpoints": [[28, 28]]})
