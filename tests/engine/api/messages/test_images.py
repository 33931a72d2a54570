"""Images in Anthropic's messages, and in results of tools."""

import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.messages.api_client import client, refusal
from tests.engine.api.test_media import BLUE, RED, data_url, ids, image, tokens_of_image
from tests.engine.api.tiny_processor import IMAGE, SPEC
from tests.engine.frontend.templates import CHATML

pytestmark = pytest.mark.usefixtures("light_processes")
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
# Writes parts for users only; contents of other roles must be texts.
TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{% if message.role == 'user' %}"
    "{% for part in message.content %}{{ part.text if part.type == 'text' else '<290>' }}{% endfor %}"
    "{% else %}{{ message.content }}{% for call in message.tool_calls or [] %}!{% endfor %}{% endif %};{% endfor %}"
    "{{ tools or '' }}"
)


def block(data: bytes, /, **more: Any) -> dict[str, Any]:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source | more}


def text(written: str) -> dict[str, Any]:
    return {"type": "text", "text": written}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


@pytest.fixture
async def server() -> AsyncIterator[InLoop]:
    async with in_loop(mm=SPEC, max_model_len=512, template=TEMPLATE) as running:
        yield running


async def prompt_of(server: InLoop, messages: Any) -> list[int]:
    """The prompt of messages, whose tokens are counted alike."""
    prompts: list[Any] = []
    add_request = server.client.add_request

    def add(given: Any, *arguments: Any) -> Any:
        prompts.append(given[0])
        return add_request(given, *arguments)

    server.client.add_request = add  # type: ignore[method-assign]
    try:
        message = await client(server).messages.create(model="fake", messages=messages, max_tokens=1)
    finally:
        server.client.add_request = add_request  # type: ignore[method-assign]
    counted = await client(server).messages.count_tokens(model="fake", messages=messages)
    used = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    assert len(prompts[0]) == counted.input_tokens == used
    return list(prompts[0])


async def test_images_stand_among_the_texts(server: InLoop):
    link = {"type": "image", "source": {"type": "url", "url": data_url(BLUE)}}
    prompt = await prompt_of(server, [user(text("a"), block(RED), text("b"), link)])
    assert prompt == [*ids("u:a"), *tokens_of_image(RED), ord("b"), *tokens_of_image(BLUE), ord(";")]
    answer = await server.post(
        "/v1/chat/completions",
        messages=[user(text("a"), image(RED), text("b"), image(BLUE))],
        max_tokens=1,
        return_token_ids=True,
    )
    assert answer["prompt_token_ids"] == prompt


@pytest.mark.parametrize("failed", [False, True])
async def test_results_have_images_where_the_template_takes_texts_only(server: InLoop, failed: bool):
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("x"), block(RED)], "is_error": failed}
    messages = [user(text("a")), {"role": "assistant", "content": [CALL]}, user(result, block(BLUE))]
    prompt = await prompt_of(server, messages)
    begin, end = prompt.index(ord("t")), len(prompt) - len(tokens_of_image(BLUE)) - 4
    shown = "Error: x" if failed else "x"
    assert prompt[begin:end] == [*ids("t:"), *tokens_of_image(RED), *ids(f"\n{shown}")]
    assert prompt[end:] == [*ids(";u:"), *tokens_of_image(BLUE), ord(";")]


async def test_results_have_images_where_calls_are_written_as_text():
    async with in_loop(mm=SPEC, max_model_len=512, template=CHATML.replace("|im_", "")) as server:
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [block(RED)]}
        prompt = await prompt_of(server, [user(text("a")), {"role": "assistant", "content": [CALL]}, user(result)])
        found = "".join(chr(one) if one < 256 else "?" for one in prompt)
        assert found.index("<tool_call>") < found.index("<tool_response>")
        at = next(at for at in range(len(prompt)) if prompt[at : at + 14] == tokens_of_image(RED))
        assert found.index("</tool_call>") < at < found.index("\n</tool_response>") + 14


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([block(RED, data="!")], "messages[0].content[0].source: the base64 data is not valid"),
        ([text("a"), block(b"no image")], "messages[0].content[1].source"),
        ([block(RED, media_type="image/tiff")], "messages[0].content[0].source.media_type"),
        ([{"type": "image", "source": {"type": "url", "url": "ftp://a/b"}}], "messages[0].content[0].source"),
        ([text(f"<{IMAGE}>")], "messages[0].content"),
    ],
)  # fmt: skip
async def test_images_that_cannot_be_used(server: InLoop, content: Any, named: str):
    message = await refusal(server, {"model": "fake", "max_tokens": 1, "messages": [user(*content)]})
    assert message.startswith(named)
    assert not server.core.has_work
