"""/v1/messages with Anthropic's client; the core's output is a script."""

import json
from typing import Any

import pytest

from engine.api.http_options import HttpOptions
from tests.engine.api.conftest import TEMPLATE as PLAIN_TEMPLATE
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.messages.api_client import (
    ASKED,
    PATH,
    THINKS,
    TOOLS,
    USER,
    client,
    events_of,
    prompt_tokens,
    refusal,
)
from tests.engine.api.messages.test_output import check_order, without_ids
from tests.engine.api.responses.test_responses import prompt_of, served
from tests.engine.api.test_tools import CALL, OTHER

LIST = '[{"name": "get_weather", "arguments": {"city": "Rome"}}, {"name": "get_time", "arguments": {}}]'


async def whole_and_streamed(server: InLoop, **fields: Any) -> Any:
    """The message; a stream must come to the same."""
    asked = ASKED | fields
    whole = await client(server).messages.create(**asked)
    async with client(server).messages.stream(**asked) as stream:
        texts = [text async for text in stream.text_stream]
        final = await stream.get_final_message()
    assert "".join(texts) == "".join(one.text for one in whole.content if one.type == "text")
    shown = [one.to_dict() for one in (whole, final)]
    for one in shown:
        assert one.pop("id", "").startswith("msg_")  # type: ignore[attr-defined]
        one["content"] = without_ids(one["content"])  # type: ignore[arg-type]
        spent: Any = one["usage"]
        one["usage"] = [spent["output_tokens"], spent.get("output_tokens_details"), prompt_tokens(spent)]
        one.pop("stop_details", None)  # the client's own, null
    assert shown[0] == shown[1]
    check_order(events_of((await server.http.post(PATH, json=asked | {"stream": True})).text))
    return whole


async def test_a_text():
    async with served("Hello.") as server:
        message = await whole_and_streamed(server, system="Be brief.", metadata={"user_id": "x"}, service_tier="auto")
        assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
        assert [one.to_dict() for one in message.content] == [{"type": "text", "text": "Hello."}]
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "\0")
        assert prompt_of(server) == "s:Be brief.;u:hi;a:"
        assert message.usage.input_tokens + message.usage.cache_read_input_tokens == len("s:Be brief.;u:hi;a:")
        assert message.usage.output_tokens == len("Hello.\0")
        cut = await whole_and_streamed(server, max_tokens=3, system=[{"type": "text", "text": "Be brief."}])
        assert (cut.content[0].text, cut.stop_reason) == ("Hel", "max_tokens")
        assert prompt_of(server) == "s:Be brief.;u:hi;a:"


async def test_sampling_parameters():
    async with served("x") as server:
        asked = ASKED | {"max_tokens": 7}
        await client(server).messages.create(**asked, extra_body={"temperature": 0.5, "top_p": 0.25, "top_k": 3})
        params = server.app.state.prompts[-1][1]
        assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.25, 3, 7)
        assert params.stop == ["\0"]


async def test_an_output_that_fills_the_context():
    async with served("x" * 200, max_model_len=64) as server:
        message = await whole_and_streamed(server)
        assert message.stop_reason == "model_context_window_exceeded"


async def test_thoughts_text_and_calls_are_blocks():
    async with served(f"<think>So.</think>I'll look.\n{CALL}\n{OTHER}") as server:
        message = await whole_and_streamed(server, tools=TOOLS)
        thoughts, text, weather, time = message.content
        assert (thoughts.thinking, thoughts.signature, text.text) == ("So.", "", "I'll look.")
        assert (weather.name, weather.input) == ("get_weather", {"city": "Rome", "days": 2})
        assert (time.name, time.input) == ("get_time", {})
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens_details.thinking_tokens == len("So.")
        one = await whole_and_streamed(
            server, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True}
        )
        assert [block.type for block in one.content] == ["thinking", "text", "tool_use"]
        none = await whole_and_streamed(server, tools=TOOLS, tool_choice={"type": "none"})
        assert [block.type for block in none.content] == ["thinking", "text"]
        assert none.content[1].text == f"I'll look.\n{CALL}\n{OTHER}"


async def test_a_round_trip_of_a_tool():
    async with served(f"<think>So.</think>Wait.{CALL}") as server:
        first = await client(server).messages.create(**ASKED, tools=TOOLS)
        call = first.content[-1]
        assert call.type == "tool_use"
        assert prompt_of(server) == "<get_weather><get_time>u:hi;a:"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        history = [USER, {"role": "assistant", "content": first.content}]
        for more, shown in (({}, "sunny"), ({"is_error": True}, "Error: sunny")):
            messages: Any = [*history, {"role": "user", "content": [result | more]}]
            await client(server).messages.create(**ASKED | {"messages": messages}, tools=TOOLS)
            assert prompt_of(server).startswith("<get_weather><get_time>u:hi;a:Wait.<tool_call>")
            assert prompt_of(server).endswith(f";t:{shown};a:")


async def test_forced_calls():
    async with served(LIST) as server:
        forced = await whole_and_streamed(server, tools=TOOLS, tool_choice={"type": "any"})
        found = [(one.name, one.input) for one in forced.content]
        assert found == [("get_weather", {"city": "Rome"}), ("get_time", {})]
        assert forced.stop_reason == "tool_use"
        assert server.app.state.prompts[-1][1].structured_outputs.json["maxItems"] == 16
    async with served('[{"name": "get_weather", "arguments": {"city": "Rome"}}]') as server:
        only = {"type": "any", "disable_parallel_tool_use": True}
        one = await whole_and_streamed(server, tools=TOOLS, tool_choice=only)
        assert [block.name for block in one.content] == ["get_weather"]
        assert server.app.state.prompts[-1][1].structured_outputs.json["maxItems"] == 1
    async with served('{"city": "Rome", "days": 2}') as server:
        choice = {"type": "tool", "name": "get_weather"}
        [call] = (named := await whole_and_streamed(server, tools=TOOLS, tool_choice=choice)).content
        assert (call.name, call.input, named.stop_reason) == ("get_weather", {"city": "Rome", "days": 2}, "tool_use")
        asked = ASKED | {"max_tokens": 20, "tools": TOOLS, "tool_choice": choice}
        cut = await client(server).messages.create(**asked)
        assert (cut.content[0].to_dict()["input"], cut.stop_reason) == ({"city": "Rome"}, "max_tokens")


async def test_the_last_message_of_the_assistant_is_continued():
    async with served(" upon a time") as server:
        message = await whole_and_streamed(server, messages=[USER, {"role": "assistant", "content": "Once"}])
        assert prompt_of(server) == "u:hia:Once" or prompt_of(server) == "u:hi;a:Once"
        assert message.content[0].text == " upon a time"


async def test_the_length_of_thoughts_is_limited():
    script = "Let me see. It is so.</think>Yes."
    async with in_loop(HttpOptions(), THINKS, script=script, obeys_masks=True, max_model_len=2048) as server:
        for budget in (0, 1, 12, len(script) - 14, len(script) - 12, 399):
            thinking = {"type": "enabled", "budget_tokens": budget}
            message = await whole_and_streamed(server, thinking=thinking)
            thoughts = "".join(one.thinking for one in message.content if one.type == "thinking")
            assert thoughts == "Let me see. It is so."[:budget]
            assert message.usage.output_tokens_details.thinking_tokens == len(thoughts)
            # The worker goes on with its script, at the place where the end of the thoughts ends.
            assert message.content[-1].text == script[len(thoughts) + len("</think>") :]
            assert message.stop_reason == "stop_sequence"
        calls = await whole_and_streamed(server, tools=TOOLS, thinking={"type": "enabled", "budget_tokens": 3})
        assert [one.type for one in calls.content] == ["thinking", "text"]


@pytest.mark.parametrize(
    ("thinking", "begin"),
    [
        ({"type": "adaptive"}, "<think>"),
        ({"type": "adaptive", "display": "summarized"}, "<think>"),
        ({"type": "enabled", "budget_tokens": 400}, "<think>"),
        ({"type": "disabled"}, ""),
    ],
)
async def test_thinking_is_a_variable_of_the_template(thinking: Any, begin: str):
    async with in_loop(HttpOptions(), THINKS, script="So.</think>Yes.", max_model_len=2048) as server:
        counted = await client(server).messages.count_tokens(model="fake", messages=[USER], thinking=thinking)
        assert counted.input_tokens == len("u:hi;a:" + begin)
        message = await whole_and_streamed(server, thinking=thinking)
        assert message.usage.input_tokens + message.usage.cache_read_input_tokens == counted.input_tokens
        if begin:
            assert [one.to_dict() for one in message.content] == [
                {"type": "thinking", "thinking": "So.", "signature": ""},
                {"type": "text", "text": "Yes."},
            ]
            hidden = await whole_and_streamed(server, thinking=thinking | {"display": "omitted"})
            assert [one.to_dict() for one in hidden.content] == [{"type": "text", "text": "Yes."}]
        else:
            assert [one.type for one in message.content] == ["text"]


async def test_a_model_without_thoughts_has_none_to_switch_off():
    async with in_loop(HttpOptions(), PLAIN_TEMPLATE, script="Yes.", max_model_len=2048) as server:
        message = await whole_and_streamed(server, thinking={"type": "disabled"})
        assert message.content[0].text == "Yes."


async def test_the_format_of_the_text():
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    async with served('{"a": 1}') as server:
        form: Any = {"format": {"type": "json_schema", "schema": schema}}
        message = await whole_and_streamed(server, output_config=form)
        assert server.app.state.prompts[-1][1].structured_outputs.json == schema
        assert json.loads(message.content[0].text) == {"a": 1}


async def test_the_id_of_a_request_is_in_the_header_of_the_api():
    async with served("x") as server:
        raw = await client(server).messages.with_raw_response.create(**ASKED)
        assert raw.headers["request-id"].startswith("req-")
        answer = await server.http.post(PATH, json=ASKED, headers={"x-request-id": "mine"})
        assert (answer.headers["request-id"], answer.json()["id"]) == ("mine", "msg_mine")
        other = await server.http.post("/tokenize", json={"prompt": "a"})
        assert "request-id" not in other.headers


async def test_cached_tokens_are_apart_from_the_others():
    async with served("Hello.") as server:
        block = {"type": "text", "text": "long " * 20, "cache_control": {"type": "ephemeral"}}
        asked = ASKED | {"system": [block], "cache_control": {"type": "ephemeral"}}
        first = await client(server).messages.create(**asked)
        async with client(server).messages.stream(**asked) as stream:
            second = await stream.get_final_message()
        assert first.usage.cache_read_input_tokens == 0
        assert second.usage.cache_read_input_tokens
        assert prompt_tokens(first.usage.to_dict()) == prompt_tokens(second.usage.to_dict()) == len(prompt_of(server))
        del block["cache_control"]
        third = await client(server).messages.create(**ASKED | {"system": [block]})
        assert third.content == first.content


async def test_counted_tokens_are_those_of_the_prompt():
    async with served(CALL) as server:
        prompt: Any = {"system": "Be brief.", "tools": TOOLS, "tool_choice": {"type": "auto"}}
        message = await client(server).messages.create(**ASKED, **prompt)
        call = message.content[0].to_dict()
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "5"}
        for messages in (
            [USER],
            [USER, {"role": "assistant", "content": "Once"}],
            [USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}],
        ):
            await client(server).messages.create(**ASKED | prompt | {"messages": messages})
            counted = await client(server).messages.count_tokens(model="fake", messages=messages, **prompt)
            assert counted.input_tokens == len(prompt_of(server))
        assert "max_tokens" in await refusal(server, ASKED, path=f"{PATH}/count_tokens")
        assert "messages[0].role" in await refusal(
            server, {"messages": [{"role": "system", "content": "x"}]}, path=f"{PATH}/count_tokens"
        )
