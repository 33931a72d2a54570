"""Processors of Qwen2-VL and Qwen2.5-VL against transformers' image processor and formulas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from engine.errors import ModelError, RequestError
from engine.multimodal.processors.qwen2_vl import make
from engine.multimodal.processors.qwen_vision import patches_of
from engine.multimodal.processors.squares import fit
from engine.multimodal.types import Processor, Video
from tests.engine.multimodal.tiny_vision import hf_config, picture, write_model

LIMITS = {"min_pixels": 4 * 64, "max_pixels": 60 * 64}
SIZES = [(1, 1), (1, 150), (150, 1), (8, 8), (30, 17), (100, 40), (40, 100), (513, 300), (300, 513), (2000, 15)]


@pytest.fixture
def processor(tmp_path: Path) -> Processor:
    return make(write_model(tmp_path, "qwen2_vl", **LIMITS), hf_config("qwen2_vl"))


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_images_as_transformers_has_them(processor: Processor, width: int, height: int) -> None:
    own = Qwen2VLImageProcessorPil(patch_size=4, **LIMITS)
    expected = own.preprocess(picture(width, height), return_tensors="np")
    found = processor.process("image", picture(width, height), 1, {})
    assert np.array_equal(found.tensors["pixel_values"], expected["pixel_values"])
    assert np.array_equal(found.tensors["grid_thw"], expected["image_grid_thw"])
    _, rows, columns = expected["image_grid_thw"][0]
    assert found.grid == (1, rows // 2, columns // 2)
    assert found.tokens == [256] * (rows * columns // 4)
    assert len(found.tokens) <= processor.most_tokens("image", {})


def test_sizes_are_those_of_transformers() -> None:
    generator = np.random.default_rng(0)
    for height, width in generator.integers(1, 3000, (2000, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            assert fit(height, width, 28, (3136, 1_003_520)) == smart_resize(height, width), (height, width)


def test_options_of_a_request(processor: Processor) -> None:
    few = processor.process("image", picture(200, 200), 1, {"max_pixels": 4 * 64})
    assert len(few.tokens) == 4 <= processor.most_tokens("image", {"max_pixels": 4 * 64})
    same = processor.process("image", picture(200, 200), 1, {"size": {"shortest_edge": 64, "longest_edge": 4 * 64}})
    assert same.tokens == few.tokens
    for options, named in (
        ({"max_pixels": 10}, "max_pixels"),
        ({"max_pixels": "many"}, "max_pixels"),
        ({"patch_size": 8}, "patch_size"),
        ({"other": 1}, "other"),
    ):
        with pytest.raises(RequestError, match=named) as caught:
            processor.process("image", picture(20, 20), 1, options)
        assert caught.value.field == "mm_processor_kwargs"


def test_sides_of_too_large_a_ratio(processor: Processor) -> None:
    with pytest.raises(RequestError, match=r"1x1000 pixels: .* ratio of at most 200"):
        processor.process("image", picture(1, 1000), 1, {})


def test_defaults_without_files(tmp_path: Path) -> None:
    """A model of dummy weights has only a config; the sizes are those of transformers' class for its patches."""
    processor = make(tmp_path, hf_config("qwen2_vl"))
    assert processor.most_tokens("image", {}) == 1280 * 28 * 28 // 64
    assert len(processor.process("image", picture(400, 300), 1, {}).tokens) == 50 * 38


def video(frames: int, height: int = 24, width: int = 40) -> Video:
    values = np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Video(values, np.arange(frames) * 0.5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_videos(processor: Processor, frames: int) -> None:
    found = processor.process("video", video(frames), 1, {"min_pixels": 64})
    times = (frames + 1) // 2
    assert found.grid == (times, 3, 5)
    assert found.tokens == [257] * (times * 15)
    assert found.tensors["grid_thw"].tolist() == [[times, 6, 10]]
    assert found.tensors["pixel_values"].shape == (times * 60, 3 * 2 * 4 * 4)
    assert found.seconds_per_frame == (1.0 if frames > 1 else 0.0)
    assert len(found.tokens) <= processor.most_tokens("video", {"min_pixels": 64})


def test_a_video_of_one_repeated_frame_has_the_patches_of_the_image(processor: Processor) -> None:
    frame = picture(40, 24)
    image = processor.process("image", frame, 1, {})
    repeated = Video(np.stack([np.asarray(frame)] * 3), np.arange(3.0))
    found = processor.process("video", repeated, 1, {}).tensors["pixel_values"]
    np.testing.assert_allclose(found, np.tile(image.tensors["pixel_values"], (2, 1)), atol=1e-6)


def test_patches_are_in_the_order_of_transformers() -> None:
    pixels = np.random.default_rng(0).normal(size=(4, 3, 16, 24)).astype(np.float32)
    order: Any = Qwen3VLVideoProcessor.patchify  # uses none of the class's settings
    expected, *grid = order(None, torch.from_numpy(pixels)[None], 4, 2, 2)
    found = patches_of(pixels, 4, 2, 2)
    assert np.array_equal(found.values, expected[0].numpy())
    assert found.grid == tuple(grid)


def test_limits_of_videos_have_their_own_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "qwen2_vl", **LIMITS)
    (folder / "video_preprocessor_config.json").write_text('{"min_pixels": 64, "max_pixels": 384}')
    found = make(folder, hf_config("qwen2_vl")).process("video", video(2), 1, {})
    assert found.grid == (1, 1, 3)
    (folder / "video_preprocessor_config.json").write_text('{"max_pixels": 0.5}')
    with pytest.raises(ModelError, match="sizes of videos"):
        make(folder, hf_config("qwen2_vl"))


def test_videos_that_are_refused(processor: Processor) -> None:
    with pytest.raises(RequestError, match="no frames"):
        processor.process("video", video(0), 1, {})
    with pytest.raises(RequestError, match="fps"):
        processor.process("video", video(2), 1, {"fps": 1})
