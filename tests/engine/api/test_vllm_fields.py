"""Fields and endpoints of vLLM's API beyond OpenAI's."""

from typing import Any

import pytest

from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import FastBackend
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.test_app import events
from tests.engine.fake_executor import expected_tokens
from tests.engine.frontend.conftest import byte_level_library

HI = [{"role": "user", "content": "hi"}]
BEGUN = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "so"}]}]
BOTH: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 2},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 2},
}


async def test_one_model_is_found_by_its_name(server: InLoop):
    listed = (await server.http.get("/v1/models")).json()["data"]
    answer = await server.http.get("/v1/models/fake")
    assert (answer.status_code, answer.json()) == (200, listed[0])
    answer = await server.http.get("/v1/models/some/other")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "some/other" in answer.json()["error"]["message"]


async def test_names_with_slashes_are_found():
    async with in_loop() as server:
        server.state.names = ("team/fake", "fake")
        assert (await server.http.get("/v1/models/team/fake")).json()["id"] == "team/fake"
        assert (await server.openai.models.retrieve("team/fake")).id == "team/fake"


async def test_ping_answers_as_health_does(server: InLoop):
    assert (await server.http.get("/ping")).json() == (await server.http.get("/health")).json()
    server.client.fail_all("the core is gone")
    assert (await server.http.get("/ping")).status_code == 503


@pytest.mark.parametrize("path", list(BOTH))
async def test_the_client_names_its_request(server: InLoop, path: str):
    prefix = {"/v1/completions": "cmpl", "/v1/chat/completions": "chatcmpl"}[path]
    body = BOTH[path]
    assert (await server.post(path, **body, request_id="mine"))["id"] == f"{prefix}-mine"
    answer = await server.http.post(path, json={**body, "request_id": "mine"}, headers={"X-Request-Id": "outer"})
    assert answer.json()["id"] == f"{prefix}-outer", "the header comes first, as in vLLM"
    assert answer.headers["x-request-id"] == "outer"
    streamed = await server.http.post(path, json={**body, "request_id": "mine", "stream": True})
    assert {event["id"] for event in events(streamed.text)} == {f"{prefix}-mine"}
    assert (await server.refusal(path, {**body, "request_id": "x" * 513}))["param"] == "request_id"
    first, second = [(await server.post(path, **body))["id"] for _ in range(2)]
    assert first != second


@pytest.mark.parametrize("path", list(BOTH))
async def test_a_salt_has_a_limit(server: InLoop, path: str):
    assert (await server.refusal(path, {**BOTH[path], "cache_salt": "s" * 1025}))["param"] == "cache_salt"
    await server.post(path, **BOTH[path], cache_salt="s" * 1024)


@pytest.mark.parametrize("path", list(BOTH))
async def test_priorities_have_64_bits(path: str):
    async with in_loop(scheduling_policy="priority") as server:
        for priority in (-(2**63), 2**40, 2**63 - 1):
            await server.post(path, **BOTH[path], priority=priority)
        assert (await server.refusal(path, {**BOTH[path], "priority": 2**63}))["param"] == "priority"


async def test_a_chat_echoes_the_message_that_it_continues(server: InLoop):
    body = {"messages": BEGUN, "max_tokens": 3, "add_generation_prompt": False, "continue_final_message": True}
    plain = (await server.post("/v1/chat/completions", **body))["choices"][0]["message"]["content"]
    echoed = await server.post("/v1/chat/completions", **body, echo=True, n=2)
    assert [one["message"]["content"] for one in echoed["choices"]] == ["so" + plain] * 2
    streamed = await server.http.post("/v1/chat/completions", json={**body, "echo": True, "stream": True})
    assert "".join(event["choices"][0]["delta"]["content"] for event in events(streamed.text)) == "so" + plain
    assert echoed["usage"]["completion_tokens"] == 6, "what is echoed was not generated"


async def test_a_message_of_the_user_is_not_echoed(server: InLoop):
    plain = await server.post("/v1/chat/completions", messages=HI, max_tokens=3)
    echoed = await server.post("/v1/chat/completions", messages=HI, max_tokens=3, echo=True)
    assert echoed["choices"] == plain["choices"]


async def test_the_written_prompt_is_returned_once(server: InLoop):
    body = {"messages": HI, "max_tokens": 3, "return_prompt_text": True, "n": 2}
    answer = await server.post("/v1/chat/completions", **body)
    assert answer["prompt_text"] == "u:hi;"
    assert answer["choices"][0]["message"]["content"] == bytes(expected_tokens(b"u:hi;", 3)).decode()
    chunks = events((await server.http.post("/v1/chat/completions", json={**body, "stream": True})).text)
    assert [chunk["prompt_text"] for chunk in chunks if "prompt_text" in chunk] == ["u:hi;"]
    assert "prompt_text" not in await server.post("/v1/chat/completions", messages=HI, max_tokens=3)


async def test_token_strings_are_those_of_the_vocabulary(server: InLoop):
    assert (await server.post("/tokenize", prompt="ab"))["token_strs"] is None
    server.client.tokenizer = Tokenizer(FastBackend(byte_level_library()))
    found = await server.post("/tokenize", prompt="the the", add_special_tokens=False, return_token_strs=True)
    assert "".join(found["token_strs"]) == "theĠthe"
    assert len(found["token_strs"]) == found["count"]
