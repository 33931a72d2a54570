"""Bodies are limited while they are received, counted before they are decoded, and declared as JSON."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import body as module
from engine.api.body import SMALL_BODY, count_values
from engine.api.http_options import HttpOptions, Limits
from tests.engine.api.conftest import InLoop, in_loop

TEXTS = st.text() | st.text('\\",[]{}a')
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=20,
)


def expected(value: Any) -> tuple[int, int]:
    """Values as they are counted: commas and openers outside of strings, and one."""
    if not isinstance(value, list | dict):
        return 0, 0
    inner = [expected(one) for one in (value.values() if isinstance(value, dict) else value)]
    return max(len(value) - 1, 0) + sum(one[0] for one in inner), 1 + sum(one[1] for one in inner)


@settings(max_examples=40, deadline=None)
@given(JSON, st.integers(1, 9), st.booleans())
def test_values_are_counted_outside_of_strings_wherever_the_pieces_end(value: Any, piece: int, ascii_only: bool):
    commas, openers = expected(value)
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    before, module.PIECE = module.PIECE, piece
    try:
        assert count_values(data) == (1 + commas + openers, openers)
    finally:
        module.PIECE = before


async def test_a_body_beyond_the_limit_is_refused_while_it_is_received():
    options = HttpOptions(limits=Limits(max_body_bytes=1000))
    async with in_loop(options=options) as server:
        error = await server.refusal("/v1/completions", {"prompt": "a" * 1000}, 413)
        assert (error["code"], error["type"]) == ("request_too_large", "invalid_request_error")
        assert "1,000" in error["message"]
        assert "--max-body-bytes" in error["message"]
        taken = 0

        async def endless() -> Any:  # no length is declared
            nonlocal taken
            while taken < 100_000:
                taken += 100
                yield b" " * 100

        headers = {"content-type": "application/json"}
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            taken = 0
            answer = await server.http.post(path, content=endless(), headers=headers)
            assert answer.status_code == 413
        assert (await server.post("/v1/completions", prompt="a", max_tokens=1))["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([1] * 2000, "2,00"), ([[]] * 300, "302 JSON lists and objects"), ([{}] * 300, "lists and objects")],
)
async def test_a_body_of_many_values_is_refused_before_it_is_decoded(prompt: Any, said: str):
    padding = "," * SMALL_BODY  # commas within a text are no values
    async with in_loop(options=HttpOptions(limits=Limits(max_body_values=1500))) as server:
        error = await server.refusal("/v1/completions", {"prompt": prompt, "user": padding}, 413)
        assert said in error["message"]
        assert "--max-body-values" in error["message"]
        error = await server.refusal("/v1/completions", {"prompt": [1] * 200, "user": padding})
        assert "128" in error["message"], "few values: the prompt is what is too long"


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_what_a_web_page_may_send_unasked_is_refused_on_every_post_route(server: InLoop, media_type: str):
    await server.post("/v1/completions", prompt=list(range(20)), max_tokens=1)
    headers = {"content-type": media_type} if media_type else {}
    posts = [route.path for route in server.app.routes if "POST" in getattr(route, "methods", ())]
    assert len(posts) >= 7
    for path in posts:
        answer = await server.http.post(path, content=b'{"prompt": "a"}', headers=headers)
        assert answer.status_code == 415, path
        assert "application/json" in answer.json()["error"]["message"]
    answer = await server.http.post("/reset_prefix_cache", headers={**headers, "origin": "https://other.example"})
    assert answer.status_code == 415
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = await server.http.post("/reset_prefix_cache", headers=headers)
    assert answer.json() == {"success": True, "forgotten_blocks": 5}, "nothing was forgotten before"


async def test_a_post_without_a_body_needs_no_media_type(server: InLoop):
    for path in ("/reset_prefix_cache", "/ping"):
        assert (await server.http.post(path)).status_code == 200
        assert (await server.http.post(path, headers={"origin": "https://other.example"})).status_code == 415
    assert (await server.http.post("/tokenize")).status_code == 415
