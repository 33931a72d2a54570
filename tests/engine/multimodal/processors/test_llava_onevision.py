"""LLaVA-OneVision's tokens and tiles equal those of transformers' processor, for one image and for several."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.errors import ModelError, RequestError
from engine.multimodal.processors import llava_onevision
from engine.multimodal.types import Video
from tests.engine.multimodal.llava_configs import IMAGE, ODD_SIZES, ONEVISION_GRID, config_of, noise, write_options

FIELDS: dict[str, Any] = {
    "size": {"height": 28, "width": 28}, "image_grid_pinpoints": ONEVISION_GRID, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip


def reference(images: Any) -> tuple[list[int], Any]:
    """The number of tokens of each image, and the tensors; `images` as transformers' image processor takes them."""
    from transformers.models.llava_onevision import processing_llava_onevision as module
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    inner = LlavaOnevisionImageProcessorPil(**FIELDS)
    found = inner(images, return_tensors="np")
    # The class can't be made without torchvision, but its counting needs only these.
    fields = {
        "image_processor": inner, "num_image_tokens": 16, "vision_feature_select_strategy": "full", "image_token": "x",
        "vision_aspect_ratio": "anyres_max_4",
    }  # fmt: skip
    whole: Any = SimpleNamespace(**fields)
    for name in ("_get_number_of_features", "_get_unpadded_features"):
        setattr(whole, name, getattr(module.LlavaOnevisionProcessor, name).__get__(whole))
    counts = [
        len(module.LlavaOnevisionProcessor.replace_image_token(whole, found, number))
        for number in range(len(found["image_sizes"]))
    ]
    return counts, found


@pytest.mark.parametrize("size", [*ODD_SIZES, (112, 112), (111, 113), (300, 112)])
@pytest.mark.parametrize("has_file", [True, False])
def test_one_image(tmp_path: Path, size: tuple[int, int], has_file: bool) -> None:
    if has_file:
        write_options(tmp_path, image_processor_type="LlavaOnevisionImageProcessorFast", **FIELDS)
    ours = llava_onevision.make(tmp_path, config_of("llava_onevision"))
    found = ours.process("image", noise(*size), 1, {})
    counts, expected = reference([noise(*size)])
    assert found.tokens == [IMAGE] * counts[0]
    assert found.tensors.keys() == {"pixel_values", "image_sizes"}
    for name, values in found.tensors.items():
        assert np.array_equal(values, expected[name]), name
    assert len(found.tokens) <= ours.most_tokens("image", {})


def test_several_images(tmp_path: Path) -> None:
    ours = llava_onevision.make(tmp_path, config_of("llava_onevision"))
    images = [noise(*size, seed) for seed, size in enumerate(ODD_SIZES[:4])]
    counts, expected = reference([images])
    for number, image in enumerate(images):
        found = ours.process("image", image, len(images), {})
        assert len(found.tokens) == counts[number] == 17
        for name, values in found.tensors.items():
            assert np.array_equal(values[0], expected[name][number]), (number, name)


def test_an_image_that_would_grow_too_much(tmp_path: Path) -> None:
    ours = llava_onevision.make(tmp_path, config_of("llava_onevision"))
    with pytest.raises(RequestError, match="1x10000 pixels would have 100000000 pixels"):
        ours.process("image", noise(1, 10_000), 2, {})


def clip(frames: int, height: int = 50, width: int = 40) -> Video:
    values = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Video(values, np.arange(frames) * 0.5)


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_frames_of_a_video(tmp_path: Path, frames: int) -> None:
    """Pixels are those of an image processor with the same steps, since the one for videos needs torchvision."""
    from transformers import SiglipImageProcessorPil
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    fields = {"size": {"height": 28, "width": 28}, "resample": 3, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3] * 3}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(fields))
    ours = llava_onevision.make(tmp_path, config_of("llava_onevision", video_token_index=IMAGE + 1))
    found = ours.process("video", clip(frames), 1, {})
    expected = SiglipImageProcessorPil(**fields)(list(clip(frames).frames), return_tensors="np")["pixel_values"]
    assert found.tensors.keys() == {"pixel_values_videos"}
    assert np.array_equal(found.tensors["pixel_values_videos"], expected)
    assert found.tensors["pixel_values_videos"].flags.c_contiguous
    whole: Any = SimpleNamespace(num_image_tokens=16, video_token="x")
    written = LlavaOnevisionProcessor.replace_video_token(whole, {"pixel_values_videos": expected[None]}, 0)
    assert found.tokens == [IMAGE + 1] * len(written)
    assert ours.most_tokens("video", {}, frames) == len(written)  # type: ignore[call-arg]


def test_videos_that_are_refused(tmp_path: Path) -> None:
    ours = llava_onevision.make(tmp_path, config_of("llava_onevision"))
    with pytest.raises(RequestError, match="the model's processor has no option 'fps'"):
        ours.process("video", clip(1), 1, {"fps": 2})
    with pytest.raises(RequestError, match="the video has no frames"):
        ours.process("video", clip(0), 1, {})
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": {"height": 384, "width": 384}}))
    with pytest.raises(ModelError, match=r"makes frames of \{.*384.*\}, the model takes 28x28"):
        llava_onevision.make(tmp_path, config_of("llava_onevision"))
