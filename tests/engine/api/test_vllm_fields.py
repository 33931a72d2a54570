"""Fields and endpoints of vLLM's API beyond OpenAI's."""

from typing import Any

import pytest
from msgspec.structs import replace

from engine.api.completions import best_outputs
from engine.api.fingerprint import system_fingerprint
from engine.frontend.streams import CollectedOutput, TokenLogprob
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


async def test_the_best_outputs_are_shown(server: InLoop):
    body = {"prompt": ["ab", "cd"], "max_tokens": 4, "seed": 3, "temperature": 1.0}
    answer = await server.post("/v1/completions", **body, n=2, best_of=5)
    assert [one["index"] for one in answer["choices"]] == [0, 1, 2, 3]
    assert all(one["logprobs"] is None for one in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * 5 * 4
    error = await server.refusal("/v1/completions", {"prompt": "a", "best_of": 129})
    assert (error["param"], "best_of is 129" in error["message"]) == ("best_of", True)


def test_the_best_outputs_have_the_highest_mean_logprob() -> None:
    outputs = [CollectedOutput() for _ in range(6)]
    for output, logprobs in zip(outputs, ([-3.0], [-1.0, -2.0], [-9.0], [-1.0], [-4.0, -4.0], [-2.0]), strict=True):
        output.logprobs = [TokenLogprob(0, value, 1, ()) for value in logprobs]
    assert best_outputs(outputs, 3, 1) == [1, 3]
    assert best_outputs(outputs, 3, 2) == [1, 0, 3, 5]
    assert best_outputs(outputs, 1, 1) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("path", list(BOTH))
async def test_invocations_are_answered_by_their_fields(server: InLoop, path: str):
    body = BOTH[path] | {"temperature": 0, "request_id": "mine"}
    wanted, found = await server.post(path, **body), await server.post("/invocations", **body)
    for answer in (wanted, found):
        del answer["created"], answer["usage"]
    assert found == wanted
    streamed = await server.http.post("/invocations", json=body | {"stream": True})
    assert "".join(one["choices"][0].get("text", "") for one in events(streamed.text)) or "chat" in path
    assert streamed.text.endswith("data: [DONE]\n\n")


async def test_other_invocations_are_refused(server: InLoop):
    for body in ({}, {"prompt": None}, {"input": "a"}, b"[]", b"nonsense"):
        assert "messages or prompt" in (await server.refusal("/invocations", body))["message"]
    assert (await server.refusal("/invocations", {"prompt": "a", "n": 0}))["param"] == "n"


async def test_the_load_counts_requests_that_run(server: InLoop):
    assert (await server.http.get("/load")).json() == {"server_load": 0}
    server.client.stats.live = 3
    assert (await server.http.get("/load")).json() == {"server_load": 3}


async def test_the_fingerprint_is_that_of_the_server(server: InLoop):
    found = set()
    for path, body in BOTH.items():
        found.add((await server.post(path, **body))["system_fingerprint"])
        streamed = events((await server.http.post(path, json=body | {"stream": True})).text)
        found |= {one["system_fingerprint"] for one in streamed}
    [fingerprint] = found
    assert fingerprint == system_fingerprint(server.client.ready)
    assert fingerprint != system_fingerprint(replace(server.client.ready, quantization="int8"))


async def test_ping_answers_as_health_does(server: InLoop):
    for ping in (await server.http.get("/ping"), await server.http.post("/ping")):
        assert ping.json() == (await server.http.get("/health")).json()
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
