"""Images of Mistral's own format have the tokens and pixels of mistral-common."""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from PIL import Image

from engine.config import EngineConfig
from engine.errors import ModelError, RequestError
from engine.model.model_info import read_hf_config
from engine.multimodal.processors import llava, pixtral
from engine.multimodal.types import Processor
from tests.engine.model.checkpoints.mistral_files import write_tekken
from tests.engine.model.checkpoints.mistral_reference import BREAK, END, IMAGE, MERGING, write_model
from tests.engine.multimodal.llava_configs import noise

SHIPPED = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
SIZES = [(1, 1), (50, 40), (1, 1000), (1000, 1), (32, 32), (33, 3), (512, 300)]


def processor(folder: Path, **more: Any) -> Processor:
    write_model(folder, **more)
    config = read_hf_config(folder, EngineConfig(model=str(folder)))
    return (pixtral if config.model_type == "mistral3" else llava).make(folder, config)


def encoded(image: Image.Image, patch: int, most: int, merge: int) -> Any:
    from mistral_common.protocol.instruct.chunk import ImageChunk
    from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs

    return ImageEncoder(ImageConfig(patch, most, merge), SpecialImageIDs(IMAGE, BREAK, END))(ImageChunk(image=image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("more", "merge"), [({}, 1), (MERGING, 2)])
def test_equals_mistral_common(tmp_path: Path, size: tuple[int, int], more: dict[str, Any], merge: int) -> None:
    ours = processor(tmp_path, **more)
    found, expected = ours.process("image", noise(*size), 1, {}), encoded(noise(*size), 4, 32, merge)
    assert found.tokens == expected.tokens
    assert np.array_equal(found.tensors["pixel_values"][0], expected.image)
    assert found.tensors["pixel_values"].flags.c_contiguous
    assert found.tokens.count(IMAGE) * (4 * merge) ** 2 == expected.image[0].size
    assert len(found.tokens) <= ours.most_tokens("image", {})


def test_the_largest_image(tmp_path: Path) -> None:
    ours = processor(tmp_path)
    assert len(ours.process("image", noise(90, 90), 1, {}).tokens) == ours.most_tokens("image", {}) == 8 * 9


def test_the_tokenizer_s_settings_are_used(tmp_path: Path) -> None:
    shutil.copy(SHIPPED, tmp_path / "tekken.json")
    ours = processor(tmp_path, patch_size=16, image_size=1024)
    found, expected = ours.process("image", noise(70, 50), 1, {}), encoded(noise(70, 50), 16, 1024, 1)
    assert found.tokens == expected.tokens
    assert np.array_equal(found.tensors["pixel_values"][0], expected.image)
    assert ours.most_tokens("image", {}) == 64 * 65


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "doesn't suit the model: patches of 16 pixels merged by 1"),
        ({"patch_size": 16, "image_end_token_id": 14}, "img_end=14"),
    ],
)
def test_a_tokenizer_of_another_model(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    shutil.copy(SHIPPED, tmp_path / "tekken.json")
    with pytest.raises(ModelError, match=says):
        processor(tmp_path, **more)


def test_a_tokenizer_of_a_text_model(tmp_path: Path) -> None:
    write_tekken(tmp_path)
    with pytest.raises(ModelError, match="has no settings for images"):
        processor(tmp_path)


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps({"vocab": 1}))
    with pytest.raises(ModelError, match=r"tekken\.json can't be read"):
        processor(tmp_path)


def test_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no option 'size'"):
        processor(tmp_path).process("image", noise(8, 8), 1, {"size": 3})
