"""The processor of Gemma 3 against transformers' own, which needs no torchvision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Gemma3ImageProcessorPil, Gemma3Processor, PreTrainedTokenizerFast

from engine.errors import RequestError
from engine.multimodal.processors.gemma3 import make
from tests.engine.multimodal.tiny_vision import hf_config, picture, write_model, write_tokenizer

CROPS: dict[str, Any] = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
OPTIONS = [{}, CROPS, {**CROPS, "pan_and_scan_max_num_crops": 2}, {**CROPS, "pan_and_scan_min_ratio_to_activate": 3.0}]
NAMED = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
BREAKS = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]  # as Gemma's vocabulary, which has tokens for several line breaks


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 1000), (70, 30), (30, 100), (300, 200), (16, 16)])
def test_as_transformers(tmp_path: Path, width: int, height: int, options: dict[str, Any]) -> None:
    """The prompt with its expanded placeholder has the tokens of transformers, merged with the text around."""
    folder = write_model(tmp_path, "gemma3")
    write_tokenizer(folder, list(NAMED.values()), merges=BREAKS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), extra_special_tokens=NAMED)
    config = hf_config("gemma3")
    named = zip(("boi_token_index", "image_token_index", "eoi_token_index"), NAMED.values(), strict=True)
    for field, token in named:
        setattr(config, field, tokenizer.convert_tokens_to_ids(token))
    own = Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 16, "width": 16}), tokenizer, image_seq_length=4)
    left, right = "user\n", "\nwhat is it?"
    expected = own(images=[picture(width, height)], text=f"{left}<start_of_image>{right}", images_kwargs=options)

    found = make(folder, config).process("image", picture(width, height), 1, options)
    prompt = tokenizer.encode(f"{left}{found.before}<start_of_image>{found.after}{right}", add_special_tokens=False)
    at = prompt.index(config.boi_token_index)
    assert [*prompt[:at], *found.tokens, *prompt[at + 1 :]] == expected["input_ids"][0]
    assert np.array_equal(found.tensors["pixel_values"], np.stack(expected["pixel_values"]))
    assert found.tokens.count(config.image_token_index) == 4 * len(found.tensors["pixel_values"])
    assert len(found.tokens) <= make(folder, config).most_tokens("image", options)


def test_what_is_refused(tmp_path: Path) -> None:
    processor = make(tmp_path, hf_config("gemma3"))
    for options, named in (
        ({"pan_and_scan_max_num_crops": 100}, "pan_and_scan_max_num_crops must be from 1 to 16"),
        ({"size": {"height": 8, "width": 8}}, "the model takes 16x16 only"),
    ):
        with pytest.raises(RequestError, match=named) as caught:
            processor.process("image", picture(20, 20), 1, options)
        assert caught.value.field == "mm_processor_kwargs"
    with pytest.raises(RequestError, match="images only, no video") as caught:
        processor.process("video", picture(20, 20), 1, {})
    assert caught.value.field == "video_url"


def test_crops_are_off_whatever_the_folder_declares(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "gemma3", size={"height": 16, "width": 16}, **CROPS)
    found = make(folder, hf_config("gemma3")).process("image", picture(90, 30), 1, {})
    assert len(found.tensors["pixel_values"]) == 1
