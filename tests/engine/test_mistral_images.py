"""A chat with images in Mistral's own format: the tokens are mistral-common's, the answer transformers'."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.multimodal.types import Processed
from redline import LLM, SamplingParams
from tests.engine.model.checkpoints.mistral_files import SPECIAL, TEKKEN_SIZE, write_tekken
from tests.engine.multimodal.llava_configs import noise
from tests.engine.worker.mm_model import save
from tests.engine.worker.mm_models_pixtral import MISTRAL, PIXTRAL_FIELDS, TOWER, as_mistral, images

TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
IDS = range(len(SPECIAL), len(SPECIAL) + 3)
NEW = 6
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder, and transformers' class with the same weights."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("pixtral")
    text = {**MISTRAL, "vocab_size": TEKKEN_SIZE}
    config = LlavaConfig(vision_config=TOWER, text_config=text, image_token_index=IDS[0], **PIXTRAL_FIELDS)
    torch.manual_seed(7)
    reference: Any = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32)
    save(reference, folder, tuple(IDS))
    ids = dict(zip(("image_token_id", "image_break_token_id", "image_end_token_id"), IDS, strict=True))
    as_mistral(reference, folder, **ids)
    write_tekken(folder, [*SPECIAL, *TOKENS], image={"image_patch_size": 4, "max_image_size": 32})
    return folder, reference


@pytest.fixture(scope="module")
def llm(model: tuple[Path, Any]) -> Iterator[LLM]:
    with LLM(
        str(model[0]), tokenizer_mode="mistral", dtype="float32", max_model_len=512, max_num_seqs=4, mm_processors=1,
        limit_mm_per_prompt={"image": 4},
    ) as running:  # fmt: skip
        yield running


def url(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def parts(*content: str | Image.Image) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": one} if isinstance(one, str) else {"type": "image_url", "image_url": {"url": url(one)}}
        for one in content
    ]


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": parts(noise(50, 40), "the quick fox")}],
    "several": [{"role": "user", "content": parts("the", noise(20, 12, 1), "in", noise(9, 30, 2), "fox")}],
    "turns": [
        {"role": "system", "content": "the"},
        {"role": "user", "content": parts("in", noise(20, 12, 1))},
        {"role": "assistant", "content": "fox"},
        {"role": "user", "content": parts(noise(1, 30, 3), "quick")},
    ],
    "no image": [{"role": "user", "content": "the quick fox"}],
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_tokens_are_mistrals_and_the_answer_transformers(kind: str, llm: LLM, model: tuple[Path, Any]) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    folder, reference = model
    messages = CONVERSATIONS[kind]
    tokenizer = MistralTokenizer.from_file(str(folder / "tekken.json"))
    whole: Any = tokenizer.encode_chat_completion(ChatCompletionRequest.from_openai(messages))
    [answer] = llm.chat(messages, GREEDY)
    assert answer.prompt_token_ids == whole.tokens
    ids = torch.tensor([whole.tokens])
    pixels = [Processed([], {"pixel_values": np.ascontiguousarray(one)[None]}) for one in whole.images]
    out = reference.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
        pad_token_id=0, **images(ids, pixels),
    )  # fmt: skip
    assert answer.outputs[0].token_ids == out[0, ids.shape[1] :].tolist()
