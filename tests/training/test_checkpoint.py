"""The files that ship, and the checkpoint that they make with a text model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from engine.data import datasets_folder
from engine.model.vision_model import assemble
from tests.tiny import TINY
from training.checkpoint import PLACEHOLDER_ID, write_checkpoint
from training.tower import Tower, pixels

SHIPPED = datasets_folder() / "vision-model"
WORDS = ["<|im_start|>", "<|im_end|>", *"abcdefghijklmn", "<empty_output>", "what"]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    config = LlamaConfig(**{name: value for name, value in TINY.items() if name != "architectures"})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.add_special_tokens([WORDS[0], WORDS[1], WORDS[PLACEHOLDER_ID]])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(1)
    return Tower(hidden=int(str(TINY["hidden_size"]))).eval()


@pytest.fixture(scope="module")
def folder(text_model: Path, tower: Tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shipped, whole = tmp_path_factory.mktemp("shipped"), tmp_path_factory.mktemp("whole")
    for name in ("chat_template.jinja", "processor_config.json"):
        shutil.copy(SHIPPED / name, shipped)
    write_checkpoint(tower, text_model, shipped)
    assemble(text_model, shipped, whole)
    return whole


def test_transformers_reads_it(folder: Path, text_model: Path, tower: Tower) -> None:
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

    model, found = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = LlamaForCausalLM.from_pretrained(text_model)
    torch.testing.assert_close(model.lm_head.weight, text.lm_head.weight)
    picture = np.random.default_rng(0).integers(256, size=(1, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = tower.to(torch.bfloat16).connector(tower.tower_output(pixels(picture).bfloat16()))
        found = model.get_image_features(pixel_values=pixels(picture).bfloat16(), vision_feature_layer=-1,
                                         vision_feature_select_strategy="default").pooler_output[0]  # fmt: skip
    torch.testing.assert_close(found, expected[0])


def test_its_processor_gives_the_pixels_of_the_training(folder: Path) -> None:
    from PIL import Image
    from transformers import AutoImageProcessor

    picture = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    found = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, pixels(picture[None]), atol=1e-6, rtol=0)


def test_a_picture_is_one_token_before_the_question(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert tokenizer.convert_tokens_to_ids("<image>") == PLACEHOLDER_ID
    assert len(tokenizer) == len(WORDS)
    content = [{"type": "text", "text": "what"}, {"type": "image"}]
    template = (folder / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text.split("<|im_start|>")[2:] == [
        "user\n<image>\nwhat<|im_end|>\n", "assistant\na<|im_end|>\n", "assistant\n",
    ]  # fmt: skip
    assert tokenizer(text).input_ids.count(PLACEHOLDER_ID) == 1


def test_all_that_ships_fits_the_code() -> None:
    from training.checkpoint import config

    shipped = json.loads((SHIPPED / "config.json").read_text())
    again = config({**shipped["text_config"], "dtype": shipped["dtype"]})
    assert again == shipped
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 12e6
