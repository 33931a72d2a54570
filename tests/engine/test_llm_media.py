"""LLM with images (docs/serving/multimodal.md): conversations, prompts with their data, and what is refused."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.errors import RequestError
from redline import LLM, SamplingParams
from tests.engine.media.make_images import encode, noise
from tests.engine.worker.mm_model import TEXT
from tests.engine.worker.mm_models_llava import CLIP

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
IMAGE, TOKENS = 200, 16  # 28 x 28 pixels in patches of 7
PICTURE, OTHER = (Image.fromarray(noise(28, 28, seed=seed)) for seed in (0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of which there is only a config.json: a stand-in tokenizer writes its placeholder as <200>."""
    from transformers import LlavaConfig

    path = tmp_path_factory.mktemp("llava")
    text = {"model_type": "llama", **TEXT, "vocab_size": 256}
    LlavaConfig(vision_config=CLIP, text_config=text, image_token_id=IMAGE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    files = tmp_path_factory.mktemp("files")
    with LLM(
        str(folder), load_format="dummy", dtype="float32", max_model_len=256, max_num_seqs=4, mm_processors=1,
        limit_mm_per_prompt={"image": 2}, allowed_local_media_path=str(files),
    ) as running:  # fmt: skip
        yield running


def ask(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def url(picture: Image.Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(encode(picture, 'PNG')).decode()}"


def test_all_forms_of_an_image_give_the_same(llm: LLM) -> None:
    conversations = [
        ask({"type": "image", "image": PICTURE}),
        ask({"type": "image_pil", "image_pil": PICTURE}),
        ask({"type": "image_url", "image_url": {"url": url(PICTURE)}}),
        ask({"type": "image", "image": np.asarray(PICTURE)}),
        ask({"type": "image", "image": encode(PICTURE, "BMP")}),
    ]
    answers = llm.chat(conversations, GREEDY)
    written = f"<{IMAGE}>\nWhat?\n"
    answers += llm.generate(
        [
            {"prompt": written, "multi_modal_data": {"image": PICTURE}},
            {"prompt_token_ids": llm.tokenizer.encode(written), "multi_modal_data": {"image": [PICTURE]}},
        ],
        GREEDY,
    )
    expected = [*[IMAGE] * TOKENS, *b"\nWhat?\n"]
    assert [answer.prompt_token_ids for answer in answers] == [expected] * len(answers)
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers}) == 1
    [several] = llm.chat(ask({"type": "image", "image": PICTURE}, {"type": "image", "image": OTHER}), GREEDY)
    assert several.prompt_token_ids.count(IMAGE) == 2 * TOKENS


def test_many_requests_share_the_places(llm: LLM) -> None:
    pictures = [Image.fromarray(noise(28, 28, seed=seed % 5)) for seed in range(30)]
    answers = llm.chat([ask({"type": "image", "image": one}) for one in pictures], GREEDY)
    tokens = [tuple(answer.outputs[0].token_ids) for answer in answers]
    assert tokens == tokens[:5] * 6
    llm._client.inputs.cache.check()  # type: ignore[union-attr]


def test_a_text_beside_images_is_served(llm: LLM) -> None:
    [plain, asked] = llm.chat([[{"role": "user", "content": "Hi"}], ask({"type": "image", "image": OTHER})], GREEDY)
    assert len(plain.outputs[0].token_ids) == len(asked.outputs[0].token_ids) == 4


def test_what_is_refused(llm: LLM) -> None:
    data = {"image": PICTURE}
    many = {"image": [PICTURE] * 3}
    refused: list[tuple[Any, str]] = [
        ({"prompt": "no placeholder", "multi_modal_data": data}, f"0 placeholders \\(<{IMAGE}>\\) for 1 image"),
        (f"<{IMAGE}>", f"1 placeholders \\(<{IMAGE}>\\) for 0 images"),
        ({"prompt": f"<{IMAGE}>" * 3, "multi_modal_data": many}, "--limit-mm-per-prompt image=2"),
        ({"prompt": f"<{IMAGE}>", "multi_modal_data": {"image": "file:///etc/passwd"}}, "is not below the folder"),
        ({"prompt": f"<{IMAGE}>", "multi_modal_data": {"image": 5}}, "must be a PIL image"),
        ({"prompt": f"<{IMAGE}>", "multi_modal_data": {"image": io.BytesIO()}}, "must be a PIL image"),
        ({"prompt": f"<{IMAGE}>", "multi_modal_data": {"picture": 5}}, "multi_modal_data has 'picture'"),
        ({"prompt": "x", "multi_modal_data": {"audio": (np.zeros(9), 16_000)}}, "this model takes no sounds"),
    ]
    for prompt, reason in refused:
        with pytest.raises(RequestError, match=reason):
            llm.generate(prompt, GREEDY)
    with pytest.raises(RequestError, match="stands for an image"):
        llm.chat([{"role": "user", "content": f"<{IMAGE}>"}], GREEDY)
