"""The processor of InternVL against transformers' image processor and text of an image."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from engine.errors import RequestError
from engine.multimodal.processors.internvl import make
from engine.multimodal.types import Video
from tests.engine.multimodal.tiny_vision import hf_config, picture, write_model

SIZES = [(1, 1), (1, 1000), (1000, 1), (16, 16), (100, 40), (40, 100), (513, 300)]


@pytest.mark.parametrize("options", [{}, {"max_patches": 4}, {"min_patches": 3}, {"crop_to_patches": False}])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_as_transformers(tmp_path: Path, width: int, height: int, options: dict[str, Any]) -> None:
    size = {"height": 16, "width": 16}
    folder = write_model(tmp_path, "internvl", size=size, crop_to_patches=False)
    own = GotOcr2ImageProcessorPil(size=size)
    expected = own.preprocess(picture(width, height), **{"crop_to_patches": True, **options}, return_tensors="np")
    replaced: Any = InternVLProcessor.replace_image_token
    texts = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=4
    )
    text = replaced(texts, {"num_patches": expected["num_patches"].tolist()}, 0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    processor = make(folder, hf_config("internvl"))
    found = processor.process("image", picture(width, height), 1, options)
    assert np.array_equal(found.tensors["pixel_values"], expected["pixel_values"])
    assert found.tokens == tokenizer.encode(text, add_special_tokens=False)
    assert len(found.tokens) <= processor.most_tokens("image", options)


def test_most_tokens_are_those_of_the_most_tiles(tmp_path: Path) -> None:
    processor = make(tmp_path, hf_config("internvl"))
    largest = processor.process("image", picture(320, 180), 1, {})
    assert len(largest.tokens) == processor.most_tokens("image", {}) - 4 * 4  # a grid of 9 tiles or so
    assert processor.most_tokens("image", {}) == 13 * 4 + 2
    assert processor.most_tokens("image", {"max_patches": 2}) == 3 * 4 + 2
    assert processor.most_tokens("image", {"crop_to_patches": False}) == 4 + 2


def test_what_is_refused(tmp_path: Path) -> None:
    processor = make(tmp_path, hf_config("internvl"))
    for options, named in (
        ({"max_patches": 10_000}, "max_patches must be from 1 to 64"),
        ({"size": {"height": 8, "width": 8}}, "the model takes 16x16 only"),
    ):
        with pytest.raises(RequestError, match=named) as caught:
            processor.process("image", picture(20, 20), 1, options)
        assert caught.value.field == "mm_processor_kwargs"


@pytest.mark.parametrize("frames", [1, 2, 12])
def test_frames_of_a_video_as_transformers(tmp_path: Path, frames: int) -> None:
    """Pixels are those of an image processor with the same steps, since the one for videos needs torchvision."""
    fields: dict[str, Any] = {"size": {"height": 16, "width": 16}, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    folder = write_model(tmp_path, "internvl", **fields)
    values = np.random.default_rng(frames).integers(0, 256, (frames, 50, 40, 3), dtype=np.uint8)
    own = SiglipImageProcessorPil(**fields, resample=3)
    expected = own(list(values), return_tensors="np")["pixel_values"]
    replaced: Any = InternVLProcessor.replace_video_token
    texts = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=4
    )
    text = replaced(texts, {"pixel_values_videos": expected[None]}, 0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    processor = make(folder, hf_config("internvl"))
    found = processor.process("video", Video(values, np.arange(frames) * 0.5), 1, {"max_patches": 3})
    assert np.array_equal(found.tensors["pixel_values_videos"], expected)
    assert [*tokenizer.encode(found.before), *found.tokens] == tokenizer.encode(text, add_special_tokens=False)
    assert processor.most_tokens("video", {}, frames) == len(found.tokens)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="no option 'fps'"):
        processor.process("video", Video(values, np.arange(frames) * 0.5), 1, {"fps": 1})
