"""/v1/responses with OpenAI's client; the core's output is a script."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import openai
import pytest

from engine.api.http_options import HttpOptions, Limits
from engine.frontend.sampling_params import SamplingParams
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.test_tools import CALL, OTHER, TEMPLATE

PATH = "/v1/responses"
ASKED: dict[str, Any] = {"model": "fake", "input": "hi", "max_output_tokens": 400, "extra_body": {"stop": "\0"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [
    {"type": "function", "name": "get_weather", "description": "d", "parameters": SCHEMA},
    {"type": "function", "name": "get_time"},
]
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
WRONG_SCHEMA = {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@contextlib.asynccontextmanager
async def served(script: str, max_model_len: int = 2048, **options: Any) -> AsyncIterator[InLoop]:
    """A server that keeps the prompts of its requests."""
    async with in_loop(HttpOptions(**options), TEMPLATE, script=script, max_model_len=max_model_len) as server:
        prompts: list[tuple[Any, SamplingParams]] = []
        add_request = server.client.add_request

        def add(given: Any, params: Any, *arguments: Any) -> Any:
            prompts.append((given[0], params))
            return add_request(given, params, *arguments)

        server.client.add_request = add  # type: ignore[method-assign]
        server.app.state.prompts = prompts
        yield server


def prompt_of(server: InLoop) -> str:
    """The prompt of the last request, of which each token is a character."""
    return bytes(server.app.state.prompts[-1][0]).decode()


def check_order(events: Iterable[Any]) -> None:
    """Assert what clients rely on: numbers, the first and the last event, and the events of each item in order."""
    events = list(events)
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert [one.type for one in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert events[-1].type == f"response.{final.status}"
    assert [one.item.to_dict() for one in events if one.type == "response.output_item.done"] == [
        one.to_dict() for one in final.output
    ]
    for index, item in enumerate(final.output):
        own = [one for one in events[2:-1] if one.output_index == index]
        assert (own[0].type, own[-1].type) == ("response.output_item.added", "response.output_item.done")
        assert {getattr(one, "item_id", item.id) for one in own} == {item.id}
        text = "".join(one.delta for one in own if one.type.endswith(".delta"))
        kinds = [one.type.removeprefix("response.") for one in own if not one.type.endswith(".delta")]
        if item.type == "function_call":
            assert kinds == ["output_item.added", "function_call_arguments.done", "output_item.done"]
            assert text == item.arguments == own[-2].arguments
        else:
            name = "output_text" if item.type == "message" else "reasoning_text"
            assert kinds == [
                "output_item.added", "content_part.added", f"{name}.done", "content_part.done", "output_item.done",
            ]  # fmt: skip
            assert text == item.content[0].text == own[-3].text
    assert [one.output_index for one in events[2:-1]] == sorted(one.output_index for one in events[2:-1])


def without_ids(response: Any) -> dict[str, Any]:
    """A response without what differs each time."""
    shown = response.to_dict()
    for name in ("id", "created_at", "completed_at"):
        assert shown.pop(name)
    for item in shown["output"]:
        assert item.pop("id")
        item.pop("call_id", None)
    shown["usage"].pop("input_tokens_details")  # the second one finds the prompt in the cache
    return dict(shown)


async def whole_and_streamed(server: InLoop, **fields: Any) -> Any:
    """The response; a stream must come to the same."""
    asked = ASKED | fields
    whole = await server.openai.responses.create(**asked)
    events = [one async for one in await server.openai.responses.create(**asked, stream=True)]
    check_order(events)
    final: Any = events[-1]
    assert without_ids(final.response) == without_ids(whole)
    return whole


async def test_a_text():
    async with served("Hello.") as server:
        response = await whole_and_streamed(server, instructions="Be brief.", metadata={"a": "b"})
        assert (response.status, response.output_text) == ("completed", "Hello.")
        assert [one.type for one in response.output] == ["message"]
        assert prompt_of(server) == "s:Be brief.;u:hi;a:"
        usage = response.usage
        assert (usage.input_tokens, usage.output_tokens) == (len("s:Be brief.;u:hi;a:"), len("Hello.\0"))
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert (response.metadata, response.temperature) == ({"a": "b"}, 1.0)


async def test_the_stream_of_the_client():
    async with served(f"<think>So.</think>Wait.{CALL}") as server:
        async with server.openai.responses.stream(**ASKED, tools=TOOLS) as stream:
            events = [one async for one in stream]
            final = await stream.get_final_response()
        assert final.output_text == "Wait."
        texts = [one for one in events if one.type == "response.output_text.delta"]
        assert "".join(one.delta for one in texts) == texts[-1].snapshot == "Wait."
        arguments = [one for one in events if one.type == "response.function_call_arguments.delta"]
        assert json.loads(arguments[-1].snapshot) == {"city": "Rome", "days": 2}


@pytest.mark.parametrize("options", [None, {}, {"include_usage": True}, {"include_obfuscation": False}])
async def test_the_last_event_of_a_stream_has_the_usage(options: Any):
    async with served("Hello.") as server:
        asked = {"input": "hi", "max_output_tokens": 5, "stream": True, "stream_options": options}
        answer = await server.http.post("/v1/responses", json=asked)
        last = json.loads(answer.text.strip().rpartition("data: ")[2])
        assert (last["type"], last["response"]["usage"]["output_tokens"]) == ("response.incomplete", 5)


async def test_reasoning_text_and_calls_are_items():
    async with served(f"<think>\nSo.\n</think>\n\nI'll look.\n{CALL}\n{OTHER}") as server:
        response = await whole_and_streamed(server, tools=TOOLS, tool_choice="auto")
        reasoning, message, weather, time = response.output
        assert reasoning.content[0].text == "So."
        assert message.content[0].text == "I'll look."
        assert (weather.name, json.loads(weather.arguments)) == ("get_weather", {"city": "Rome", "days": 2})
        assert (time.name, time.arguments) == ("get_time", "{}")
        assert weather.call_id != time.call_id
        assert response.usage.output_tokens_details.reasoning_tokens == len("So.")
        one = await whole_and_streamed(server, tools=TOOLS, parallel_tool_calls=False)
        assert [item.type for item in one.output] == ["reasoning", "message", "function_call"]
        none = await whole_and_streamed(server, tools=TOOLS, tool_choice="none")
        assert [item.type for item in none.output] == ["reasoning", "message"]


@pytest.mark.parametrize("asked", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
@pytest.mark.parametrize("script", ["Yes.", "<think>\nSo.\n</think>\n\nYes."])
async def test_texts_have_logprobs(script: str, asked: dict[str, Any]):
    async with served(script) as server:
        response = await whole_and_streamed(server, **asked)
        part = response.output[-1].content[0]
        assert "".join(one.token for one in part.logprobs) == part.text == "Yes."
        assert [len(one.top_logprobs) for one in part.logprobs] == [asked.get("top_logprobs", 0)] * 4
        assert response.top_logprobs == asked.get("top_logprobs", 0)
        streamed = await server.openai.responses.create(**ASKED, **asked, stream=True)
        deltas = [one async for one in streamed if one.type == "response.output_text.delta"]
        assert all("".join(token.token for token in one.logprobs) == one.delta for one in deltas)
        plain = await whole_and_streamed(server)
        assert plain.output[-1].content[0].logprobs == []


async def test_an_output_that_is_too_long_is_incomplete():
    async with served("Hello.") as server:
        response = await whole_and_streamed(server, max_output_tokens=3)
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (response.output_text, response.output[0].status) == ("Hel", "incomplete")


async def test_an_empty_output_is_an_empty_message():
    async with served("\0") as server:
        response = await whole_and_streamed(server)
        assert (response.status, response.output_text, len(response.output)) == ("completed", "", 1)


async def test_results_of_calls():
    async with served(CALL) as server:
        create = server.openai.responses.create
        first = await create(**ASKED, tools=TOOLS)
        [call] = first.output
        assert call.type == "function_call"
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        await create(**ASKED | {"input": [result], "previous_response_id": first.id}, tools=TOOLS)
        chained = prompt_of(server)
        assert chained.endswith(";t:sunny;a:")
        history = [{"role": "user", "content": "hi"}, call.to_dict(), result]
        await create(**ASKED | {"input": history}, tools=TOOLS)
        assert prompt_of(server) == chained
        parts = [{"type": "input_text", "text": "sunny"}]
        await create(**ASKED | {"input": [*history[:2], result | {"output": parts}]}, tools=TOOLS)
        assert prompt_of(server) == chained


async def test_a_conversation_in_the_store():
    async with served("<think>A.</think>Yes.") as server:
        create = server.openai.responses.create
        first = await create(**ASKED, instructions="Old.")
        again = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "more"}]}]}
        second = await create(**ASKED | again, previous_response_id=first.id, instructions="New.")
        assert second.previous_response_id == first.id
        assert prompt_of(server) == "s:New.;u:hi;a:Yes.;u:more;a:"  # instructions are those of one request
        stored = await server.openai.responses.retrieve(second.id)
        assert stored == second
        listed = await server.openai.responses.input_items.list(second.id, order="asc")
        assert [one.type for one in listed.data] == ["message", "reasoning", "message", "message"]
        page = await server.openai.responses.input_items.list(second.id, limit=2)
        assert [one.id for one in page.data] == [one.id for one in listed.data[:1:-1]]
        rest = await server.openai.responses.input_items.list(second.id, after=page.data[-1].id)
        assert [one.id for one in rest.data] == [one.id for one in listed.data[1::-1]]
        await server.openai.responses.delete(first.id)
        await create(**ASKED, previous_response_id=second.id)  # a conversation outlives the responses in it
        await refused(server, create(**ASKED, previous_response_id=first.id), "was deleted", 404)
        await refused(server, server.openai.responses.cancel(second.id), "has ended")


async def test_a_streamed_response_is_kept_and_one_with_store_false_is_not():
    async with served("Yes.") as server:
        create = server.openai.responses.create
        events: list[Any] = [one async for one in await create(**ASKED, stream=True)]
        assert await server.openai.responses.retrieve(events[-1].response.id) == events[-1].response
        hidden = await create(**ASKED, store=False)
        assert hidden.store is False
        await refused(server, server.openai.responses.retrieve(hidden.id), "store: false", 404)


async def test_responses_belong_to_their_key():
    async with served("Yes.", api_keys=("one", "two")) as server:
        one, two = (server.openai.with_options(api_key=key).responses for key in ("one", "two"))
        made = await one.create(**ASKED)
        await refused(server, two.retrieve(made.id), "not stored here", 404)
        await refused(server, two.create(**ASKED, previous_response_id=made.id), "not stored here", 404)
        assert (await one.retrieve(made.id)).id == made.id


async def test_limits_of_the_store():
    async with served("Yes.", limits=Limits(max_stored_responses=2)) as server:
        create, store = server.openai.responses.create, server.state.responses
        first, second = [await create(**ASKED) for _ in range(2)]
        await server.openai.responses.retrieve(first.id)  # now the second one was not used for longer
        await create(**ASKED)
        assert len(store.own) == 2
        assert (await server.openai.responses.retrieve(first.id)).id == first.id
        await refused(server, server.openai.responses.retrieve(second.id), "--max-stored-responses", 404)


async def refused(server: InLoop, call: Any, text: str, status: int = 400) -> None:
    with pytest.raises(openai.APIStatusError, match=text) as caught:
        await call
    assert caught.value.status_code == status


async def test_the_format_of_the_text():
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    form: Any = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    async with served('{"a": 1}') as server:
        response = await server.openai.responses.create(**ASKED, text={"format": form})
        assert server.app.state.prompts[-1][1].structured_outputs.json == schema
        assert json.loads(response.output_text) == {"a": 1}
        assert response.text is not None
        assert response.text.format is not None
        assert response.text.format.to_dict() == form
        await server.openai.responses.create(**ASKED, text={"format": {"type": "json_object"}})
        assert server.app.state.prompts[-1][1].structured_outputs.json_object


async def test_a_format_beside_an_enforced_call():
    """instructor sends both, of the same schema."""
    form = {"type": "json_schema", "name": "f", "schema": {"enum": [1]}}
    choice: Any = {"type": "function", "name": "f"}
    tool: Any = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
    async with served("{}") as server:
        asked = {**ASKED, "text": {"format": form}, "tools": [tool], "tool_choice": choice}
        [call] = (await server.openai.responses.create(**asked)).output
        assert (call.type, call.arguments) == ("function_call", "{}")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [user({"type": "input_file", "file_id": "f"})]}, "input[0].content[0]"),
        ({"input": [user({"type": "input_image", "file_id": "f"})]}, "input[0].content[0].file_id"),
        ({"instructions": "x", "input": [user(IMAGE)]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "y"}]}, "input[0].arguments"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": WRONG_SCHEMA}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"truncation": "some"}, "truncation"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"include": ["message.output_text.words"]}, "include"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ],
)  # fmt: skip
async def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str):
    async with served("x") as server:
        error = await server.refusal(PATH, {"input": "hi", **fields})
        assert error["param"] == param
        assert not server.core.has_work
        assert len(server.state.responses.own) == 0


async def test_truncation():
    async with served("x", max_model_len=128) as server:
        long = "a" * 200
        error = await server.refusal(PATH, {"input": long, "max_output_tokens": 8})
        assert "tokens" in error["message"]
        response = await server.openai.responses.create(
            model="fake", input=long, max_output_tokens=8, truncation="auto"
        )
        assert prompt_of(server).endswith("aa;a:")
        assert response.usage is not None
        assert response.usage.input_tokens == 120


async def test_a_death_of_the_engine_ends_the_stream_with_a_failed_response():
    async with served("x" * 300) as server:

        async def read() -> list[Any]:
            return [one async for one in await server.openai.responses.create(**ASKED, stream=True)]

        reading = asyncio.ensure_future(read())
        while not server.app.state.prompts:
            await asyncio.sleep(0)
        server.client.fail_all("it is over")
        events = await reading
        assert (events[-1].type, events[-1].response.error.code) == ("response.failed", "server_error")
        assert "it is over" in events[-1].response.error.message
        assert len(server.state.responses.own) == 0
