import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.api.http_options import HttpOptions
from tests.engine.api.conftest import VOCABULARY, InLoop, in_loop
from tests.engine.fake_executor import expected_tokens

CHAT = [{"role": "user", "content": "hi"}]


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, which must end as streams do."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


async def test_the_model_card_says_what_clients_must_know(server: InLoop):
    [card] = (await server.http.get("/v1/models")).json()["data"]
    assert (card["id"], card["max_model_len"], card["vocab_size"], card["owned_by"]) == ("fake", 128, 300, "redline")


async def test_a_completion(server: InLoop):
    answer = await server.post("/v1/completions", prompt=[1, 2, 3], max_tokens=5, return_token_ids=True)
    [choice] = answer["choices"]
    assert choice["token_ids"] == expected_tokens([1, 2, 3], 5)
    assert choice["text"] == bytes(choice["token_ids"]).decode()
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 8
    assert answer["object"] == "text_completion"


async def test_many_prompts_and_outputs_come_in_order(server: InLoop):
    answer = await server.post("/v1/completions", prompt=["ab", "cd"], n=2, max_tokens=3, return_token_ids=True)
    texts = [choice["token_ids"] for choice in answer["choices"]]
    first, second = (expected_tokens(text.encode(), 3) for text in ("ab", "cd"))
    assert texts == [first, first, second, second]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_stream_says_what_the_whole_answer_says(server: InLoop):
    body = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 6, "echo": True}
    whole = await server.post("/v1/completions", **body)
    options = {"include_usage": True}
    streamed = await server.http.post("/v1/completions", json=body | {"stream": True, "stream_options": options})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(streamed.text)
    for choice in whole["choices"]:
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["length"]
        assert len(mine) == 6, "a chunk a token"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in (*chunks, last)}) == 1


async def test_tokens_without_text_of_their_own_have_a_chunk_too(server: InLoop):
    prompt = [1, 2, 3]
    tokens = expected_tokens(prompt, 8)
    stop = bytes(tokens[4:8]).decode()
    body = {"prompt": prompt, "max_tokens": 8, "stream": True, "stop": stop, "return_token_ids": True}
    chunks = events((await server.http.post("/v1/completions", json=body)).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [token for one in choices for token in one["token_ids"]] == tokens
    assert "".join(one["text"] for one in choices) == bytes(tokens[:4]).decode()
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["stop_reason"] == stop


async def test_usage_in_every_chunk(server: InLoop):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "ab", "max_tokens": 3, "stream": True, "stream_options": options}
    chunks = events((await server.http.post("/v1/completions", json=body)).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3]


async def test_a_chat_streamed_and_whole(server: InLoop):
    whole = await server.post("/v1/chat/completions", messages=CHAT, max_completion_tokens=4)
    [choice] = whole["choices"]
    assert choice["message"]["content"] == bytes(expected_tokens(b"u:hi;", 4)).decode()
    body = {"messages": CHAT, "max_tokens": 4, "stream": True}
    chunks = events((await server.http.post("/v1/chat/completions", json=body)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role") for delta in deltas] == ["assistant", None, None, None]
    assert "".join(delta["content"] for delta in deltas) == choice["message"]["content"]
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_chat_without_a_limit_goes_on_as_long_as_it_fits(server: InLoop):
    answer = await server.post("/v1/chat/completions", messages=CHAT)
    assert answer["usage"]["total_tokens"] == 128
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_the_openai_client_works_unchanged(server: InLoop):
    client = server.openai
    assert [model.id async for model in await client.models.list()] == ["fake"]
    completion = await client.completions.create(model="fake", prompt="ab", max_tokens=3)
    assert completion.choices[0].text == bytes(expected_tokens(b"ab", 3)).decode()
    text, usage = "", None
    async for chunk in await client.completions.create(
        model="fake", prompt="ab", max_tokens=3, stream=True, stream_options={"include_usage": True}
    ):
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == completion.choices[0].text
    assert usage == completion.usage
    chat = await client.chat.completions.create(model="fake", messages=CHAT, max_tokens=3)
    said = chat.choices[0].message.content
    stream = await client.chat.completions.create(model="fake", messages=CHAT, max_tokens=3, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == said
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="fake", prompt="ab", max_tokens="five")  # type: ignore[call-overload]
    assert bad.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="ab")
    assert missing.value.code == "model_not_found"


async def test_the_key_opens_what_it_must():
    async with in_loop(options=HttpOptions(api_keys=("key",))) as server:
        assert (await server.http.get("/health")).status_code == 200
        assert (await server.http.get("/metrics")).status_code == 200
        assert [model.id async for model in await server.openai.models.list()] == ["fake"]
        wrong = openai.AsyncOpenAI(base_url="http://test/v1", api_key="no", http_client=server.http, max_retries=0)
        with pytest.raises(openai.AuthenticationError) as caught:
            await wrong.models.list()
        assert caught.value.code == "invalid_api_key"
        assert (await server.http.post("/v1/completions", json={"prompt": "a"})).status_code == 401


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("/v1/completions", {"prompt": [1] * 200}, "prompt", "200"),
        ("/v1/completions", {"prompt": [1] * 200}, "prompt", "128"),
        ("/v1/completions", {"prompt": [VOCABULARY]}, "prompt", "300"),
        ("/v1/completions", {"prompt": ""}, "prompt", "empty"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, "temperature", "-1"),
        ("/v1/completions", {"prompt": "a", "logprobs": 99}, "logprobs", "99"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [999]}, "stop_token_ids", "999"),
        ("/v1/completions", b"{", None, "JSON"),
        ("/v1/chat/completions", {"messages": "hi"}, "messages", "array"),
        ("/tokenize", {}, "prompt", "prompt or messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "-1"),
        ("/detokenize", {"tokens": "x"}, "tokens", "array"),
    ],
)
async def test_bad_requests_name_the_field(server: InLoop, path: str, body: Any, param: str | None, said: str):
    error = await server.refusal(path, body)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert said in error["message"]
    assert not server.core.has_work


async def test_unknown_paths_and_methods_have_the_same_shape(server: InLoop):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = await server.http.request(method, path)
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]


async def test_a_model_without_a_template_has_no_chat():
    async with in_loop(template=None) as server:
        error = await server.refusal("/v1/chat/completions", {"messages": CHAT})
        assert "template" in error["message"]


async def test_tokenize_and_detokenize(server: InLoop):
    found = await server.post("/tokenize", prompt="ab", return_token_strs=True)
    assert (found["tokens"], found["count"], found["max_model_len"]) == ([97, 98], 2, 128)
    assert found["token_strs"] == ["a", "b"]
    assert (await server.post("/tokenize", messages=CHAT))["tokens"] == list(b"u:hi;")
    assert (await server.post("/detokenize", tokens=[97, 200]))["prompt"] == "a<200>"


async def test_prefix_hits_are_told_until_the_cache_is_reset(server: InLoop):
    body = {"prompt": list(range(20)), "max_tokens": 1}

    async def cached() -> int:
        usage = (await server.post("/v1/completions", **body))["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [await cached(), await cached()] == [0, 16]
    assert (await server.post("/reset_prefix_cache"))["forgotten_blocks"] == 5
    assert await cached() == 0
    assert (await server.post("/v1/completions", **body, cache_salt="mine"))["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 0
    }


async def test_metrics_count_what_happened(server: InLoop):
    await server.post("/v1/completions", prompt=list(range(20)), max_tokens=5)
    await server.post("/v1/completions", prompt=list(range(20)), max_tokens=5)
    text = (await server.http.get("/metrics")).text
    samples = {
        sample.name + sample.labels.get("finished_reason", ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert {name: samples[f"vllm:{name}"] for name in EXPECTED} == EXPECTED
    for family in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
        assert samples[f"vllm:{family}_count"] == 8
    assert 'model_name="fake"' in text
    assert samples["redline:engine_config_info"] == 1
    assert 'max_num_batched_tokens="' in text


EXPECTED = {
    "num_requests_running": 0,
    "num_requests_waiting": 0,
    "kv_cache_usage_perc": 0,
    "gpu_cache_usage_perc": 0,
    "num_preemptions_total": 0,
    "prefix_cache_queries_total": 40,
    "prefix_cache_hits_total": 16,
    "prompt_tokens_total": 40,
    "generation_tokens_total": 10,
    "request_success_totallength": 2,
    "request_success_totalstop": 0,
    "time_to_first_token_seconds_count": 2,
    "e2e_request_latency_seconds_count": 2,
    "request_queue_time_seconds_count": 2,
    "request_prompt_tokens_sum": 40,
    "request_generation_tokens_sum": 10,
    "iteration_tokens_total_sum": 50,
    "cache_config_info": 1,
}


async def test_health_tells_of_the_last_step_and_of_death(server: InLoop):
    assert (await server.http.get("/health")).json()["last_step_age_s"] is None
    await server.post("/v1/completions", prompt="ab")
    health = (await server.http.get("/health")).json()
    assert health["status"] == "ok"
    assert 0 <= health["last_step_age_s"] < 60
    server.client.fail_all("rank 0 is gone")
    answer = await server.http.get("/health")
    assert answer.status_code == 503
    assert answer.json()["cause"] == "rank 0 is gone"
    error = await server.refusal("/v1/completions", {"prompt": "a"}, 503)
    assert error["message"] == "rank 0 is gone"


async def test_the_version(server: InLoop):
    assert (await server.http.get("/version")).json()["version"].count(".") == 2


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_request(server: InLoop, stream: bool):
    """By hand on ASGI: httpx has no way to leave there."""
    gone = asyncio.Event()
    body = json.dumps({"prompt": "ab", "max_tokens": 100, "stream": stream}).encode()
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        first = next(messages, None)
        if first is not None:
            return first
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None: ...

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    call = asyncio.ensure_future(server.app(scope, receive, send))
    while not server.client.total_stats.live:
        await asyncio.sleep(0)
    gone.set()
    await asyncio.wait_for(call, 5)
    while server.core.has_work:
        await asyncio.sleep(0)
    assert server.client.stats.finished["abort"] == 1
    assert server.client.stats.core.generation_tokens < 100
    server.core.scheduler.check()


async def test_an_error_within_a_stream_is_an_event(server: InLoop):
    async def die() -> None:
        while not server.client.total_stats.live:
            await asyncio.sleep(0)
        server.client.fail_all("rank 0 is gone")

    body = {"prompt": "ab", "max_tokens": 100, "stream": True}
    answer, _ = await asyncio.gather(server.http.post("/v1/completions", json=body), die())
    *_, last, end = answer.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "rank 0 is gone"
    assert end == ""
    assert "[DONE]" not in answer.text, "clients take that for the end of a whole answer"


async def test_many_streams_at_once_get_what_each_would_alone(server: InLoop):
    async def one(number: int) -> None:
        prompt = [number, number + 1]
        body = {"prompt": prompt, "max_tokens": 20, "stream": True, "return_token_ids": True}
        answer: httpx.Response = await server.http.post("/v1/completions", json=body)
        tokens = [token for chunk in events(answer.text) for token in chunk["choices"][0]["token_ids"]]
        assert tokens == expected_tokens(prompt, 20)

    await asyncio.gather(*map(one, range(12)))
    assert server.client.total_stats.live == 0
