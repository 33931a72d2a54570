"""The processor of Qwen3-VL against transformers' image processor, sizes of videos and text of their frames."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from engine.multimodal.processors.qwen3_vl import make
from engine.multimodal.processors.qwen_vision import fit_frames
from engine.multimodal.types import Video
from tests.engine.multimodal.tiny_vision import hf_config, picture, write_model

SIZES = {"size": {"shortest_edge": 4 * 64, "longest_edge": 60 * 64}, "patch_size": 4, "image_mean": [0.5] * 3}


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 400), (40, 100), (513, 300)])
def test_images_as_transformers_has_them(tmp_path: Path, width: int, height: int) -> None:
    expected = Qwen2VLImageProcessorPil(**SIZES).preprocess(picture(width, height), return_tensors="np")
    processor = make(write_model(tmp_path, "qwen3_vl", **SIZES), hf_config("qwen3_vl"))
    found = processor.process("image", picture(width, height), 1, {})
    assert np.array_equal(found.tensors["pixel_values"], expected["pixel_values"])
    assert found.tokens == [256] * (len(expected["pixel_values"]) // 4)
    assert len(found.tokens) <= processor.most_tokens("image", {})


def test_sizes_of_videos_are_those_of_transformers() -> None:
    generator = np.random.default_rng(0)
    for frames, height, width in generator.integers((2, 1, 1), (64, 1500, 1500), (2000, 3)).tolist():
        if max(height, width) <= 100 * min(height, width):
            expected = smart_resize(frames, height, width, 2, 32, 65_536, 8_000_000)
            assert fit_frames(frames, height, width, 32, 2, (65_536, 8_000_000)) == expected, (frames, height, width)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_time_is_written_before_each_frame(tmp_path: Path, frames: int) -> None:
    folder = write_model(tmp_path, "qwen3_vl", **SIZES)
    times = np.arange(frames) * 2 / 3
    values = np.random.default_rng(1).integers(0, 256, (frames, 24, 40, 3), dtype=np.uint8)
    processor = make(folder, hf_config("qwen3_vl"))
    found = processor.process("video", Video(values, times), 1, {})
    grid = found.tensors["grid_thw"]
    assert found.grid == (grid[0, 0], grid[0, 1] // 2, grid[0, 2] // 2)

    replaced: Any = Qwen3VLProcessor.replace_video_token
    own = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=lambda *inputs: Qwen3VLProcessor._calculate_timestamps(None, *inputs),
    )
    metadata = SimpleNamespace(fps=1.5, frames_indices=list(range(frames)))
    text = replaced(own, {"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert found.tokens == tokenizer.encode(text, add_special_tokens=False)
    assert len(found.tokens) <= processor.most_tokens("video", {})


def test_pixels_of_a_video_are_limited_in_all(tmp_path: Path) -> None:
    processor = make(write_model(tmp_path, "qwen3_vl", **SIZES), hf_config("qwen3_vl"))
    for frames in (2, 8, 32):
        values = np.zeros((frames, 240, 400, 3), dtype=np.uint8)
        found = processor.process("video", Video(values, np.arange(frames) * 1.0), 1, {})
        times, rows, columns = found.grid
        assert 2 * times * rows * columns <= 60
        assert len(found.tokens) <= processor.most_tokens("video", {})
