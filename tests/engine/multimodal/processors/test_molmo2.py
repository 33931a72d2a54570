"""The processor of Molmo 2 against transformers', with torch's interpolation in the place of torchvision's."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Molmo2Config
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.video_utils import VideoMetadata

from engine.errors import ModelError, RequestError
from engine.multimodal.processors import molmo2
from engine.multimodal.types import Video
from tests.engine.multimodal.tiny_vision import write_tokenizer

IDS = {"<im_start>": 151936, "<im_end>": 151937, "<im_patch>": 151938, "<im_col>": 151939, "<low_res_im_start>": 151940}


class Backend:
    """What transformers' processor needs of torchvision."""

    def resize(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
        return torch.nn.functional.interpolate(image, (size.height, size.width), mode="bilinear")

    def rescale_and_normalize(self, image: torch.Tensor, *options: Any) -> torch.Tensor:
        _, factor, _, mean, std = options
        return (image * factor - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class Reference(Backend):
    _build_overlapping_crops = Molmo2ImageProcessor._build_overlapping_crops
    _preprocess = Molmo2ImageProcessor._preprocess
    _image_batch_to_patches_and_grids = Molmo2ImageProcessor._image_batch_to_patches_and_grids


def expected(image: Image.Image, **options: Any) -> tuple[dict[str, Any], list[int]]:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    own = Molmo2ImageProcessor
    found = Reference()._preprocess(
        [pixels], do_resize=True, size=SizeOf(), resample=own.resample, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=own.image_mean, image_std=own.image_std, do_convert_rgb=True,
        disable_grouping=False, return_tensors="np",
        **{"max_crops": 8, "overlap_margins": [4, 4], "patch_size": 14, "pooling_size": [2, 2], **options},
    )  # fmt: skip
    words = object.__new__(Molmo2Processor)
    words.image_use_col_tokens, words.use_single_crop_col_tokens, words.use_single_crop_start_token = True, None, True
    text = words.replace_image_token({"image_grids": found["image_grids"].tolist()}, 0)
    tokens = [IDS[f"<{word}>"] for word in text.strip("<>").split("><")]
    return dict(found), tokens


class SizeOf:
    height = width = 378


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


@pytest.fixture
def processor(tmp_path: Path) -> Any:
    return molmo2.make(tmp_path, Molmo2Config())


@pytest.mark.parametrize("size", [(640, 480), (300, 1100), (64, 64), (1600, 1200), (378, 378), (700, 30), (1, 1)])
def test_equals_transformers(processor: Any, size: tuple[int, int]) -> None:
    image = picture(*size)
    tensors, tokens = expected(image)
    found = processor.process("image", image, 1, {})
    assert found.tokens == tokens
    assert (found.tensors["image_token_pooling"] == tensors["image_token_pooling"]).all()
    assert found.tensors["image_grids"].tolist() == tensors["image_grids"].tolist()
    difference = np.abs(found.tensors["pixel_values"] - tensors["pixel_values"])
    assert difference.max() < 1.01 * 2 / 255  # a value in the middle of two bytes may be rounded to either
    assert (difference > 1e-5).mean() < 3e-3


def test_most_tokens(processor: Any) -> None:
    longest = max(
        len(processor.process("image", picture(w, h), 1, {}).tokens) for w, h in [(378, 2240), (2240, 378), (900, 900)]
    )
    assert processor.most_tokens("image", {}) == longest
    assert len(processor.process("image", picture(90, 90), 1, {"max_crops": 1}).tokens) == processor.most_tokens(
        "image", {"max_crops": 1}
    )


def test_options(processor: Any) -> None:
    image = picture(900, 700)
    tensors, tokens = expected(image, max_crops=2)
    found = processor.process("image", image, 1, {"max_crops": 2})
    assert found.tokens == tokens
    assert found.tensors["pixel_values"].shape == tensors["pixel_values"].shape
    for options, says in (
        ({"max_crops": 9}, "max_crops must be at most 8, not 9"),
        ({"max_crops": 0}, "max_crops must be an integer of at least 1, not 0"),
        ({"size": 3}, "no option 'size'; it has max_crops"),
    ):
        with pytest.raises(RequestError, match=says):
            processor.process("image", image, 1, options)


def test_token_layouts(tmp_path: Path) -> None:
    options = {"image_use_col_tokens": True, "use_single_crop_col_tokens": False, "use_single_crop_start_token": False}
    (tmp_path / "processor_config.json").write_text(json.dumps(options))
    found = molmo2.make(tmp_path, Molmo2Config()).process("image", picture(64, 64), 1, {})
    assert found.tokens[: 2 + 196] == [IDS["<im_start>"], *[IDS["<im_patch>"]] * 196, IDS["<im_end>"]]
    assert found.tokens.count(IDS["<im_col>"]) == 14


def test_folders_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"size": {"height": 336, "width": 336}}))
    with pytest.raises(ModelError, match="makes crops of"):
        molmo2.make(tmp_path, Molmo2Config())
    file.write_text(json.dumps({"overlap_margins": [14, 13]}))
    with pytest.raises(ModelError, match="larger than overlap_margins 14 and 13"):
        molmo2.make(tmp_path, Molmo2Config())
    file.unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": "<|image|>", "id": 9}]}))
    with pytest.raises(ModelError, match=r"<\|image\|> is token 9 in tokenizer.json, but 151941 by config.json"):
        molmo2.make(tmp_path, Molmo2Config())


class VideoReference(Backend):
    _build_video_patches = Molmo2VideoProcessor._build_video_patches
    _preprocess = Molmo2VideoProcessor._preprocess


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_videos_equal_transformers(tmp_path: Path, frames: int) -> None:
    write_tokenizer(tmp_path, ())
    video = Video(
        np.stack([np.asarray(picture(90 + number, 60).resize((80, 60))) for number in range(frames)]),
        np.arange(frames) * 0.5,
    )
    own = Molmo2VideoProcessor
    expected = VideoReference()._preprocess(
        [torch.from_numpy(video.frames).permute(0, 3, 1, 2)], SizeOf(), own.resample, True, 1 / 255, True,
        own.image_mean, own.image_std, 14, [3, 3], return_tensors="np",
    )  # fmt: skip
    words = object.__new__(Molmo2Processor)
    words.video_use_col_tokens, words.use_frame_special_tokens = False, True
    metadata = VideoMetadata(total_num_frames=frames, fps=2.0, frames_indices=list(range(frames)))
    found_grids = {"video_grids": torch.from_numpy(expected["video_grids"]), "video_metadata": [metadata]}
    text = words.replace_video_token(found_grids, 0)

    made = molmo2.make(tmp_path, Molmo2Config())
    found = made.process("video", video, 1, {})
    encode = made._frames.encode
    written = {"<frame_start>": 151943, "<frame_end>": 151944, "<im_patch>": IDS["<im_patch>"]}
    tokens = [
        token
        for part in re.split("(<[a-z_]+>)", text)
        for token in ([written[part]] if part in written else encode(part))
    ]
    assert [*encode(found.before), *found.tokens] == tokens
    assert (found.tensors["image_token_pooling"] == expected["video_token_pooling"]).all()
    [[count, rows, columns]] = expected["video_grids"].tolist()
    assert found.tensors["image_grids"].tolist() == [[count * rows, columns, 0, 0]]
    difference = np.abs(found.tensors["pixel_values"] - expected["pixel_values_videos"])
    assert difference.max() < 1.01 * 2 / 255
    assert (difference > 1e-5).mean() < 3e-3
    assert len(found.tokens) <= made.most_tokens("video", {}, frames)


@pytest.mark.parametrize(("frames", "rate"), [(30, 30.0), (30, 4.0), (9, 0.5), (1, 50.0)])
def test_frames_are_sampled_as_in_transformers(processor: Any, frames: int, rate: float) -> None:
    video = Video(np.zeros((frames, 8, 8, 3), dtype=np.uint8), np.arange(frames) / rate, frames / rate)
    sample: Any = Molmo2VideoProcessor.sample_frames
    metadata = VideoMetadata(total_num_frames=frames, fps=rate, duration=frames / rate)
    chosen = sample(SimpleNamespace(num_frames=64, max_fps=2), metadata)
    assert (processor._frames._sampled(video).times == video.times[chosen]).all()
