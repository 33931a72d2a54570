"""`smollm2-135m-vision` against plain transformers, and on questions about pictures that its training has not seen."""

import base64
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine.model.resolve import resolve_model
from tests.perf.eval_vision import MODEL, body, exchanged
from tests.serving import Served, serve
from training.pictures import Question, Split, load

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

COUNT = 24


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(MODEL)


@pytest.fixture(scope="module")
def split() -> Split:
    return load("test")


@pytest.fixture(scope="module")
def asked(split: Split) -> list[Question]:
    """The first question for a name about each of the first pictures."""
    first = {q.picture: q for q in reversed(split.questions) if q.answer not in ("yes", "no")}
    return [first[picture] for picture in sorted(first)[:COUNT]]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ("--dtype", "float32", "--max-model-len", "1024")
    with serve(tmp_path_factory.mktemp("served"), MODEL, *flags) as served:
        yield served


def answer_of(server: Served, question: Question, file: Path) -> str:
    request = body(question.text, base64.b64encode(file.read_bytes()).decode())
    return str(server.post("/v1/chat/completions", **request)["choices"][0]["message"]["content"])


def answers_of(server: Served, questions: list[Question], files: list[Path]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda question, file: answer_of(server, question, file), questions, files))


def test_it_names_what_pictures_show(server: Served, split: Split, asked: list[Question]) -> None:
    answers = answers_of(server, asked, [split.files[question.picture] for question in asked])
    right = [answer == question.answer for answer, question in zip(answers, asked, strict=True)]
    assert sum(right) >= 0.9 * COUNT, answers


def test_another_picture_is_another_answer(server: Served, split: Split, asked: list[Question]) -> None:
    others = exchanged([question.picture for question in asked], random.Random(0))
    answers = answers_of(server, asked, [split.files[other] for other in others])
    right = [answer == question.answer for answer, question in zip(answers, asked, strict=True)]
    assert sum(right) <= 0.5 * COUNT, answers


def test_its_tokens_are_those_of_plain_transformers(
    server: Served, folder: Path, split: Split, asked: list[Question]
) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for question in asked[:6]:
        file = split.files[question.picture]
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text.replace("<image>", "<image>" * 64), return_tensors="pt", add_special_tokens=False)
        pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
        made = model.generate(**ids, pixel_values=pixels, max_new_tokens=8, do_sample=False)
        expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer_of(server, question, file) == expected


def test_a_text_is_answered_as_by_the_text_model(server: Served, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text_folder = resolve_model("smollm2-135m")
    messages = [{"role": "user", "content": "Name three colors."}]
    tokenizer: Any = AutoTokenizer.from_pretrained(text_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(text_folder, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = server.post("/v1/chat/completions", model=MODEL, messages=messages, max_tokens=12, temperature=0)
    assert answer["choices"][0]["message"]["content"] == expected
    again = resolve_model(MODEL)
    assert again == folder
