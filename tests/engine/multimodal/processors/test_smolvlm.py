"""Videos of SmolVLM against transformers' text of frames, sampling and sizes, and its image processor for pixels."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessorPil, SmolVLMProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor, get_resize_output_image_size
from transformers.video_utils import VideoMetadata

from engine.errors import RequestError
from engine.multimodal.processors.smolvlm import in_words, make, whole_size
from engine.multimodal.types import Video
from tests.engine.multimodal.tiny_vision import hf_config, picture, write_model

SIZES: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
WORDS = {1: "one", 2: "two", 5: "five", 12: "twelve"}


def clip(frames: int, rate: float) -> Video:
    values = np.random.default_rng(frames).integers(0, 256, (frames, 30, 50, 3), dtype=np.uint8)
    return Video(values, np.arange(frames) / rate, frames / rate)


@pytest.mark.parametrize(("frames", "rate"), [(1, 1.0), (2, 0.5), (12, 0.1)])
def test_as_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, rate: float) -> None:
    folder, video = write_model(tmp_path, "smolvlm", **SIZES), clip(frames, rate)
    own = SmolVLMImageProcessorPil(**SIZES)
    pixels = [
        own.preprocess(Image.fromarray(frame), do_image_splitting=False, return_tensors="np")["pixel_values"][0, 0]
        for frame in video.frames
    ]
    monkeypatch.setattr(processing_smolvlm, "num2words", WORDS.__getitem__)  # the package isn't installed
    replaced: Any = SmolVLMProcessor.replace_video_token
    texts = SimpleNamespace(
        image_seq_len=4, image_token="<image>", fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )  # fmt: skip
    metadata = VideoMetadata(
        total_num_frames=frames, fps=rate, duration=frames / rate, frames_indices=list(range(frames))
    )
    text = replaced(texts, {"pixel_values": np.stack(pixels)[None], "video_metadata": [metadata]}, 0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    processor = make(folder, hf_config("smolvlm"))
    found = processor.process("video", video, 1, {})
    assert np.array_equal(found.tensors["pixel_values_videos"], np.stack(pixels))
    around = [tokenizer.encode(part, add_special_tokens=False) for part in (found.before, found.after)]
    assert [*around[0], *found.tokens, *around[1]] == tokenizer.encode(text, add_special_tokens=False)
    assert len(found.tokens) <= processor.most_tokens("video", {}, frames)  # type: ignore[call-arg]


@pytest.mark.parametrize(("frames", "rate"), [(30, 30.0), (30, 4.0), (9, 0.5), (20, 50.0)])
def test_frames_are_sampled_as_in_transformers(tmp_path: Path, frames: int, rate: float) -> None:
    folder, video = write_model(tmp_path, "smolvlm", **SIZES), clip(frames, rate)
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({**SIZES, "video_sampling": {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 32}}})
    )
    sample: Any = SmolVLMVideoProcessor.sample_frames
    metadata = VideoMetadata(total_num_frames=frames, fps=rate, duration=frames / rate)
    chosen = sample(SimpleNamespace(num_frames=8, fps=1), metadata, skip_secs=0)
    processor = make(folder, hf_config("smolvlm"))
    found = processor.process("video", video, 1, {})
    whole = processor.process("video", Video(video.frames[chosen], video.times[chosen]), 1, {})
    assert len(found.tensors["pixel_values_videos"]) == len(chosen)
    assert np.array_equal(found.tensors["pixel_values_videos"], whole.tensors["pixel_values_videos"])
    assert processor.most_tokens("video", {}) >= len(found.tokens)


def test_sizes_are_those_of_transformers() -> None:
    for width, height in np.random.default_rng(0).integers(1, 900, (500, 2)).tolist():
        expected = get_resize_output_image_size(torch.zeros(1, height, width), 512)
        assert whole_size(width, height, 512) == expected[::-1], (width, height)


def test_images_are_those_of_idefics3(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "smolvlm", **SIZES)
    processor = make(folder, hf_config("smolvlm"))
    found = processor.process("image", picture(60, 30), 1, {})
    assert found.tokens.count(256) == 4 * len(found.tensors["pixel_values"]) <= processor.most_tokens("image", {})
    with pytest.raises(RequestError, match="no option 'fps'"):
        processor.process("video", clip(1, 1.0), 1, {"fps": 1})


def test_numbers_in_words() -> None:
    numbers = {
        0: "zero",
        19: "nineteen",
        20: "twenty",
        32: "thirty-two",
        100: "one hundred",
        215: "two hundred and fifteen",
    }
    assert {number: in_words(number) for number in numbers} == numbers
