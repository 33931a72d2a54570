"""The processor of Idefics3 and SmolVLM against transformers' image processor and text of an image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from engine.errors import ModelError
from engine.multimodal.processors.idefics3 import AROUND, IMAGE, WHOLE, make
from tests.engine.multimodal.tiny_vision import hf_config, picture, write_model, write_tokenizer

SIZES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}


@pytest.mark.parametrize("options", [{}, {"do_image_splitting": False}, {"size": {"longest_edge": 32}}])
@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (16, 16), (100, 40), (40, 100), (513, 300)])
def test_as_transformers(tmp_path: Path, model_type: str, width: int, height: int, options: dict[str, Any]) -> None:
    folder = write_model(tmp_path, model_type, **SIZES)
    expected = SmolVLMImageProcessorPil(**SIZES).preprocess(
        picture(width, height), **options, return_row_col_info=True, return_tensors="np"
    )
    rows, columns = expected["rows"][0][0], expected["cols"][0][0]
    text = get_image_prompt_string(rows, columns, 4, AROUND, IMAGE, WHOLE)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    processor = make(folder, hf_config(model_type))
    found = processor.process("image", picture(width, height), 1, options)
    assert np.array_equal(found.tensors["pixel_values"], expected["pixel_values"][0])
    assert expected["pixel_attention_mask"].all()  # the encoder gets no mask
    assert found.tokens == tokenizer.encode(text, add_special_tokens=False)
    assert found.tokens.count(256) == 4 * len(found.tensors["pixel_values"])
    assert len(found.tokens) <= processor.most_tokens("image", options)


def test_defaults_without_files(tmp_path: Path) -> None:
    """A model of dummy weights has only a config: no tokens for rows and columns, and up to 4 x 4 tiles."""
    processor = make(tmp_path, hf_config("smolvlm"))
    found = processor.process("image", picture(300, 300), 1, {})
    assert found.tensors["pixel_values"].shape == (17, 3, 16, 16)
    assert found.tokens == [256] * (17 * 4)
    assert processor.most_tokens("image", {}) == 17 * 4


def test_a_folder_for_another_tower_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "smolvlm", size={"longest_edge": 64}, max_image_size={"longest_edge": 8})
    with pytest.raises(ModelError, match="max_image_size must be the 16 pixels"):
        make(folder, hf_config("smolvlm"))


def test_a_tokenizer_with_other_ids_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "smolvlm", **SIZES)
    write_tokenizer(folder, ["<other>", IMAGE])
    with pytest.raises(ModelError, match="another id for <image>"):
        make(folder, hf_config("smolvlm")).process("image", picture(20, 20), 1, {})


@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1), (9973, 1)])
def test_extreme_ratios(tmp_path: Path, width: int, height: int) -> None:
    processor = make(write_model(tmp_path, "smolvlm", **SIZES), hf_config("smolvlm"))
    found = processor.process("image", picture(width, height), 1, {})
    assert found.tokens.count(256) == 4 * len(found.tensors["pixel_values"]) > 4
