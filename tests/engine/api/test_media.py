"""Chats with images, audio and video through the whole server (docs/serving/multimodal.md): prompts and refusals."""

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.tiny_processor import EMBEDDING, IMAGE, SPEC, tokens_of
from tests.engine.media.make_images import encode, noise
from tests.engine.media.test_audio import TONE
from tests.engine.media.test_audio import encode as encode_audio
from tests.engine.media.test_video import encode as encode_video

pytestmark = pytest.mark.usefixtures("light_processes")
RED, BLUE = (encode(Image.new("RGB", (3, 2), color), "PNG") for color in ("red", "blue"))
CHAT = "/v1/chat/completions"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def text(written: str) -> dict[str, Any]:
    return {"type": "text", "text": written}


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 1}


def tokens_of_image(data: bytes) -> list[int]:
    return tokens_of("image", np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def ids(written: str) -> list[int]:
    return list(written.encode())


@pytest.fixture
async def server() -> AsyncIterator[InLoop]:
    async with in_loop(mm=SPEC, max_model_len=512) as running:
        yield running


async def test_images_stand_where_the_template_puts_them(server: InLoop) -> None:
    answer = await server.post(CHAT, **user(text("What?"), image(RED), image(BLUE)), return_token_ids=True)
    expected = [*ids("u:"), *tokens_of_image(RED), *ids("\n"), *tokens_of_image(BLUE), *ids("\nWhat?;")]
    assert answer["prompt_token_ids"] == expected
    assert answer["usage"]["prompt_tokens"] == len(expected)


async def test_openais_client_sends_an_image_and_streams(server: InLoop) -> None:
    messages: Any = user(text("What?"), image(RED))["messages"]
    stream = await server.openai.chat.completions.create(
        model="fake", messages=messages, max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].usage.prompt_tokens == len([*ids("u:\nWhat?;"), *tokens_of_image(RED)])


async def test_audio_and_video(server: InLoop) -> None:
    sound = base64.b64encode(encode_audio(TONE[:1000])).decode()
    film = encode_video([50, 100, 200])
    body = user(
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": data_url(film, "video/mp4")}},
        text("?"),
    )
    answer = await server.post(CHAT, **body, return_token_ids=True)
    prompt = answer["prompt_token_ids"]
    assert prompt[:4] == [*ids("u:"), EMBEDDING, ord("a")]
    assert prompt[4:8] == [*(1000).to_bytes(4, "little")]
    at = prompt.index(EMBEDDING, 4)
    assert prompt[at - 2 : at + 10] == [*ids("\n["), EMBEDDING, ord("v"), 3, 0, 0, 0, 24, 0, 0, 0]
    assert prompt[-4:] == ids("]\n?;")


async def test_tokenize_counts_what_a_request_would_take(server: InLoop) -> None:
    body = user(text("What?"), image(RED))
    found = await server.post("/tokenize", messages=body["messages"])
    answer = await server.post(CHAT, **body, return_token_ids=True)
    assert found["tokens"] == answer["prompt_token_ids"]
    assert found["count"] == len(found["tokens"])


@pytest.mark.parametrize("kind", ["prompt_logprobs", "logprobs"])
async def test_options_that_need_ids_see_the_expanded_prompt(server: InLoop, kind: str) -> None:
    body = user(image(RED), text("x"))
    option = {"prompt_logprobs": 0} if kind == "prompt_logprobs" else {"logprobs": True, "top_logprobs": 1}
    answer = await server.post(CHAT, **body, **option, return_token_ids=True)
    if kind == "prompt_logprobs":
        assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])
    assert EMBEDDING in answer["prompt_token_ids"]


async def test_truncation_never_cuts_an_input(server: InLoop) -> None:
    body = user(text("abc"), image(RED))
    whole = (await server.post(CHAT, **body, return_token_ids=True))["prompt_token_ids"]
    behind = len(whole) - 2  # without "u:", which stands before the image
    kept = await server.post(CHAT, **body, truncate_prompt_tokens=behind, return_token_ids=True)
    assert kept["prompt_token_ids"] == whole[2:]
    error = await server.refusal(CHAT, body | {"truncate_prompt_tokens": behind - 1})
    assert "would cut an image" in error["message"]
    assert error["param"] == "truncate_prompt_tokens"
    assert "would cut" in (await server.refusal(CHAT, body | {"truncate_prompt_tokens": 3}))["message"]


async def test_a_text_never_stands_for_an_input(server: InLoop) -> None:
    written = f"<{IMAGE}>"
    error = await server.refusal(CHAT, user(text(f"say {written}"), image(RED)))
    assert "which stands for an image" in error["message"]
    assert error["param"] == "messages[0].content[0].text"
    for prompt in (written, [5, IMAGE], ["a", f"b{written}"]):
        refused = await server.refusal("/v1/completions", {"prompt": prompt, "max_tokens": 1})
        assert f"1 placeholders ({written}) for 0 images" in refused["message"]


async def test_limits_of_numbers() -> None:
    spec = SPEC.__class__(SPEC.family, SPEC.placeholders, SPEC.most_tokens, {"image": 1, "audio": 0})
    async with in_loop(mm=spec, max_model_len=512) as server:
        assert (await server.post(CHAT, **user(image(RED))))["usage"]["completion_tokens"] == 1
        error = await server.refusal(CHAT, user(image(RED), text("x"), image(BLUE)))
        assert "2 images, but at most 1 may be in one (--limit-mm-per-prompt image=1)" in error["message"]
        assert error["param"] == "messages[0].content[2].image_url.url"
        sound = {"type": "input_audio", "input_audio": {"data": "AAAA"}}
        assert "at most 0" in (await server.refusal(CHAT, user(sound)))["message"]


async def test_models_of_texts_name_the_part() -> None:
    async with in_loop() as server:
        error = await server.refusal(CHAT, user(text("x"), image(RED)))
        assert error["message"] == "messages[0].content[1]: this model takes no images, only texts"
        assert error["param"] == "messages[0].content[1]"


async def test_errors_of_an_input_name_its_field(server: InLoop) -> None:
    error = await server.refusal(CHAT, user(image(RED), image(b"no image")))
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert "none of PNG, JPEG, WebP, GIF and BMP" in error["message"]


async def test_prompts_that_are_too_long_with_their_inputs_are_refused() -> None:
    async with in_loop(mm=SPEC, max_model_len=32) as server:
        assert "the prompt is too long" in (await server.refusal(CHAT, user(*[image(RED)] * 3)))["message"]
        assert server.client.inputs is not None
        server.client.inputs.cache.check()  # all inputs were released


async def test_equal_images_are_processed_once(server: InLoop) -> None:
    for _ in range(3):
        await server.post(CHAT, **user(image(RED), image(RED)))
    assert server.client.inputs is not None
    cache = server.client.inputs.cache
    cache.check()
    assert not any(one.users for one in cache._by_hash.values())
    assert len(cache._by_hash) == 1
    await server.post(CHAT, **user(image(encode(Image.fromarray(noise(5, 5)), "PNG"))))
    assert len(cache._by_hash) == 2


@pytest.mark.parametrize("ablated", ["inline-frontend", "inline-processing", "inline-frontend inline-processing"])
async def test_parts_of_v0_serve_the_same(ablated: str) -> None:
    async with in_loop(mm=SPEC, ablations=frozenset(ablated.split()), max_model_len=512) as server:
        body = user(text("What?"), image(RED), image(BLUE)) | {"max_tokens": 4}
        expected = [*ids("u:"), *tokens_of_image(RED), *ids("\n"), *tokens_of_image(BLUE), *ids("\nWhat?;")]
        answer = await server.post(CHAT, **body)
        assert answer["usage"]["prompt_tokens"] == len(expected)
        assert answer["usage"]["completion_tokens"] == 4
        assert "none of PNG" in (await server.refusal(CHAT, user(text("x"), image(b"no image"))))["message"]
        assert "stands for an image" in (await server.refusal(CHAT, user(text(f"<{IMAGE}>"))))["message"]
        completion = {"prompt": f"<{IMAGE}>", "max_tokens": 1}
        assert "for 0 images" in (await server.refusal("/v1/completions", completion))["message"]
        assert (await server.post("/v1/completions", prompt="abc", max_tokens=2))["usage"]["completion_tokens"] == 2
