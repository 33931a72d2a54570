"""Tool calls and reasoning in chats, streamed and whole; the core's output is a script."""

import json
from typing import Any

import pytest

from engine.api.http_options import HttpOptions
from tests.engine.api.conftest import TEMPLATE as PLAIN_TEMPLATE
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.test_app import events
from tests.engine.frontend import templates

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
# Writes tools and calls as Qwen's do, and the first tag of the reasoning if it is told to think.
TEMPLATE = (
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %};"
    "{% endfor %}a:{% if think %}<think>{% endif %}{# </think> #}"
)
REQUIRED = {"tool_choice": "required"}
NAMED = {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
OTHER = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
HARMONY_TEMPLATE = TEMPLATE + "{# <|channel|> #}<|start|>assistant"
BUDGET = "thinking_token_budget"
HARMONY = (
    "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Rome"}'
)


def served(script: str, template: str = TEMPLATE, *, obeys_masks: bool = False, **options: Any) -> Any:
    return in_loop(HttpOptions(**options), template, script=script, obeys_masks=obeys_masks, max_model_len=2048)


async def whole_and_streamed(server: InLoop, script: str, **body: Any) -> dict[str, Any]:
    """The choice of a chat; the stream must come to the same. The output ends after the script."""
    asked = {"messages": [USER], "max_tokens": 400, "stop_token_ids": [0], **body}
    [whole] = (await server.post(PATH, **asked))["choices"]
    answer = await server.http.post(PATH, json=asked | {"stream": True})
    assert answer.status_code == 200, answer.text
    choices = [event["choices"][0] for event in events(answer.text)]
    deltas = [one["delta"] for one in choices]
    assert [one["finish_reason"] for one in choices] == [None] * (len(choices) - 1) + [whole["finish_reason"]]
    assert [one.get("role") for one in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    message = whole["message"]
    assert "".join(one.get("content") or "" for one in deltas) == (message["content"] or "")
    reasoning = "".join(one.get("reasoning_content") or "" for one in deltas)
    assert reasoning == (message.get("reasoning_content") or "")
    assert without_ids(streamed_calls(deltas)) == without_ids(message.get("tool_calls", []))
    assert script
    return dict(whole)


def streamed_calls(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls as clients put them together."""
    calls: list[dict[str, Any]] = []
    for part in (one for delta in deltas for one in delta.get("tool_calls", ())):
        if part["index"] == len(calls):
            assert part["type"] == "function"
            calls.append(
                {"id": part["id"], "type": "function", "function": {"name": part["function"]["name"], "arguments": ""}}
            )
        calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return calls


def without_ids(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    assert all(one["id"] for one in calls)
    assert len({one["id"] for one in calls}) == len(calls)
    return [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in calls]


async def test_calls_of_a_message():
    script = f"I'll look.\n{CALL}\n{OTHER}"
    async with served(script) as server:
        choice = await whole_and_streamed(server, script, tools=TOOLS)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "I'll look."
        expected = [("get_weather", {"city": "Rome", "days": 2}), ("get_time", {})]
        assert without_ids(choice["message"]["tool_calls"]) == expected
        one = await whole_and_streamed(server, script, tools=TOOLS, parallel_tool_calls=False)
        assert without_ids(one["message"]["tool_calls"]) == expected[:1]
        text = await whole_and_streamed(server, script, tools=TOOLS, tool_choice="none")
        assert text["message"]["content"] == script
        assert (text["finish_reason"], text["message"].get("tool_calls")) == ("stop", None)


async def test_a_message_of_a_call_alone_has_no_content():
    async with served(CALL) as server:
        choice = await whole_and_streamed(server, CALL, tools=TOOLS, tool_choice="auto")
        assert choice["message"]["content"] is None
        asked = {"messages": [USER], "max_tokens": 400, "stop_token_ids": [0], "tools": TOOLS, "stream": True}
        first = events((await server.http.post(PATH, json=asked)).text)[0]["choices"][0]["delta"]
        assert (first["role"], first["content"], first["tool_calls"][0]["index"]) == ("assistant", None, 0)


async def test_what_is_no_call_is_text():
    script = '<tool_call>{"name": "get_weather", "arguments": {"city": '
    async with served(script) as server:
        choice = await whole_and_streamed(server, script, tools=TOOLS)
        assert (choice["message"]["content"], choice["finish_reason"]) == (script, "stop")
        cut = await server.post(PATH, messages=[USER], max_tokens=20, tools=TOOLS)
        assert cut["choices"][0]["message"]["content"] == script[:20]
        assert cut["choices"][0]["finish_reason"] == "length"


async def test_reasoning_is_separated():
    script = f"<think>\nSo.\n</think>\n\nYes.{CALL}"
    async with served(script) as server:
        choice = await whole_and_streamed(server, script, tools=TOOLS)
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("So.", "Yes.")
        assert len(choice["message"]["tool_calls"]) == 1
        plain = await whole_and_streamed(server, script)
        assert (plain["message"]["reasoning_content"], plain["message"]["content"]) == ("So.", "Yes." + CALL)
        hidden = await whole_and_streamed(server, script, include_reasoning=False)
        assert "reasoning_content" not in hidden["message"]
        assert hidden["message"]["content"] == "Yes." + CALL
        unseparated = await whole_and_streamed(server, script, separate_reasoning=False)
        assert unseparated["message"]["content"] == script


@pytest.mark.parametrize(("script", "count"), [("<think>\nSo.\n</think>\n\nYes.", 3), ("Yes.", 0), ("<think>So", 2)])
async def test_usage_counts_tokens_of_reasoning(script: str, count: int):
    asked: dict[str, Any] = {"messages": [USER], "max_tokens": 400, "stop_token_ids": [0], "n": 2}
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with served(script) as server:
        usage = (await server.post(PATH, **asked))["usage"]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 2 * count}
        streamed = events((await server.http.post(PATH, json=asked | {"stream": True, "stream_options": options})).text)
        assert streamed[-1]["usage"] == usage
        counts = [one["usage"]["completion_tokens_details"]["reasoning_tokens"] for one in streamed]
        assert counts == sorted(counts)
    async with served(script, template="{{ messages[0].content }}") as server:
        assert "completion_tokens_details" not in (await server.post(PATH, **asked))["usage"]


async def test_reasoning_has_both_names():
    async with served("<think>So.</think>Yes.") as server:
        asked: dict[str, Any] = {"messages": [USER], "max_tokens": 400, "stop_token_ids": [0]}
        message = (await server.post(PATH, **asked))["choices"][0]["message"]
        assert message["reasoning"] == message["reasoning_content"] == "So."
        streamed = events((await server.http.post(PATH, json=asked | {"stream": True})).text)
        deltas = [one["choices"][0]["delta"] for one in streamed]
        assert "".join(one.get("reasoning", "") for one in deltas) == "So."


async def test_a_prompt_may_begin_the_reasoning():
    script = "So.</think>Yes."
    async with served(script) as server:
        choice = await whole_and_streamed(server, script, chat_template_kwargs={"think": True})
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("So.", "Yes.")
        assert (await whole_and_streamed(server, script))["message"]["content"] == script


@pytest.mark.parametrize(
    ("parser", "script", "call"),
    [
        ("llama3_json", '{"name": "get_time", "parameters": {}}', ("get_time", {})),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', ("get_weather", {"city": "Rome"})),
        ("qwen3_coder", "<function=get_weather><parameter=days>2</parameter></function>", ("get_weather", {"days": 2})),
        ("pythonic", "[get_weather(city='Rome')]", ("get_weather", {"city": "Rome"})),
        ("openai", HARMONY, ("get_weather", {"city": "Rome"})),
    ],
)  # fmt: skip
async def test_the_flag_names_the_form(parser: str, script: str, call: tuple[str, Any]):
    async with served(script, tool_call_parser=parser, reasoning_parser="none") as server:
        choice = await whole_and_streamed(server, script, tools=TOOLS)
        assert without_ids(choice["message"]["tool_calls"]) == [call]


async def test_harmony_s_template_is_recognized():
    async with served(HARMONY, HARMONY_TEMPLATE) as server:
        choice = await whole_and_streamed(server, HARMONY, tools=TOOLS)
        assert choice["message"]["reasoning_content"] == "So."
        assert without_ids(choice["message"]["tool_calls"]) == [("get_weather", {"city": "Rome"})]


async def test_tools_reach_models_whose_template_has_none():
    async with served(CALL, templates.CHATML) as server:
        choice = await whole_and_streamed(server, CALL, tools=TOOLS)
        assert without_ids(choice["message"]["tool_calls"]) == [("get_weather", {"city": "Rome", "days": 2})]
        shown = (await server.post("/tokenize", messages=[USER], tools=TOOLS))["tokens"]
        assert json.dumps(WEATHER) in bytes(shown).decode()
        plain = (await server.post("/tokenize", messages=[USER], tools=TOOLS, tool_choice="none"))["tokens"]
        assert plain == (await server.post("/tokenize", messages=[USER]))["tokens"]


async def test_logprobs_token_ids_and_usage_of_held_back_text():
    async with served("a" + OTHER) as server:
        asked: dict[str, Any] = {"messages": [USER], "max_tokens": 400, "stop_token_ids": [0], "tools": TOOLS}
        asked |= {"stream": True, "return_token_ids": True, "logprobs": True}
        asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, last = events((await server.http.post(PATH, json=asked)).text)
        choices = [one["choices"][0] for one in chunks]
        ids = [token for one in choices for token in one["token_ids"]]
        assert bytes(ids).decode() == "a" + OTHER + "\0"
        assert sum(len(one["logprobs"]["content"]) for one in choices if one["logprobs"]) == len(ids)
        assert last["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"] == len(ids)
        assert bytes(chunks[0]["prompt_token_ids"]).decode().endswith("a:")


async def test_several_outputs():
    async with served(OTHER) as server:
        body = {"messages": [USER], "max_tokens": 400, "stop_token_ids": [0], "tools": TOOLS, "n": 3}
        choices = (await server.post(PATH, **body))["choices"]
        assert len({one["message"]["tool_calls"][0]["id"] for one in choices}) == 3
        streamed = events((await server.http.post(PATH, json=body | {"stream": True})).text)
        calls = [one["choices"][0]["index"] for one in streamed if "tool_calls" in one["choices"][0]["delta"]]
        assert sorted(calls) == [0, 1, 2]


async def test_the_openai_client_reads_calls():
    async with served(f"Wait.{CALL}") as server:
        asked: dict[str, Any] = {"model": "fake", "messages": [USER], "tools": TOOLS, "max_tokens": 400, "stop": "\0"}
        message = (await server.openai.chat.completions.create(**asked)).choices[0].message
        assert message.tool_calls is not None
        [call] = message.tool_calls
        assert call.function.name == "get_weather"
        async with server.openai.chat.completions.stream(**asked) as stream:
            final = (await stream.get_final_completion()).choices[0]
        assert (final.finish_reason, final.message.content) == ("tool_calls", "Wait.")
        assert final.message.tool_calls is not None
        assert json.loads(final.message.tool_calls[0].function.arguments) == {"city": "Rome", "days": 2}
        history = [USER, message.model_dump(exclude_none=True)]
        for content in ("sunny", [{"type": "text", "text": "sunny"}], None):
            result = {"role": "tool", "tool_call_id": call.id, "content": content}
            answer = await server.openai.chat.completions.create(**asked | {"messages": [*history, result]})
            assert answer.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}, "tools"),
        ({"tools": [TIME, TIME]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}], **REQUIRED},
            "tools",
        ),
        ({"tools": TOOLS, "guided_regex": "a", **REQUIRED}, "guided_regex"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
async def test_tools_that_cannot_be_used(fields: dict[str, Any], param: str):
    async with served("x") as server:
        error = await server.refusal(PATH, {"messages": [USER], **fields})
        assert error["param"] == param
        assert not server.core.has_work


async def test_enforced_calls():
    first = '{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}'
    script = f'[{first}, {{"name": "get_time", "arguments": {{}}}}]'
    async with served(script) as server:
        choice = await whole_and_streamed(server, script, tools=TOOLS, **REQUIRED)
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        expected = [("get_weather", {"city": "Rome", "days": 2}), ("get_time", {})]
        assert without_ids(choice["message"]["tool_calls"]) == expected
    async with served(f"[{first}]") as server:
        choice = await whole_and_streamed(server, script, tools=TOOLS, parallel_tool_calls=False, **REQUIRED)
        assert without_ids(choice["message"]["tool_calls"]) == expected[:1]


async def test_a_named_call_is_streamed_as_it_is_written():
    script = '{"city": "Rome", "days": 2}'
    async with served(script) as server:
        choice = await whole_and_streamed(server, script, tools=TOOLS, **NAMED)
        assert choice["finish_reason"] == "stop", "as OpenAI has it"
        assert without_ids(choice["message"]["tool_calls"]) == [("get_weather", {"city": "Rome", "days": 2})]
        asked = {"messages": [USER], "tools": TOOLS, "stream": True, **NAMED}
        chunks = events((await server.http.post(PATH, json=asked)).text)
        assert len([one for one in chunks if one["choices"][0]["delta"].get("tool_calls")]) > 10


async def test_an_enforced_call_has_no_content_that_a_format_could_be_of():
    """instructor sends both, of the same schema."""
    script = '{"city": "Rome", "days": 2}'
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}}
    async with served(script) as server:
        choice = await whole_and_streamed(server, script, tools=TOOLS, response_format=schema, **NAMED)
        assert without_ids(choice["message"]["tool_calls"]) == [("get_weather", {"city": "Rome", "days": 2})]
        asked = {"messages": [USER], "tools": TOOLS, "guided_json": {"enum": [1]}, **NAMED}
        assert (await server.refusal(PATH, asked))["param"] == "guided_json"


async def test_strict_arguments():
    strict = [{"type": "function", "function": WEATHER["function"] | {"strict": True}}, TIME]
    async with served("Wait.\n" + CALL) as server:
        choice = await whole_and_streamed(server, CALL, tools=strict)
        assert without_ids(choice["message"]["tool_calls"]) == [("get_weather", {"city": "Rome", "days": 2})]
    async with served(CALL.replace(', "days": 2', ', "weeks": 2')) as server:  # a worker that ignores the masks
        error = await server.refusal(PATH, {"messages": [USER], "tools": strict}, 500)
        assert error["code"] == "internal_error"
    async with served("x", tool_call_parser="mistral") as server:
        error = await server.refusal(PATH, {"messages": [USER], "tools": strict})
        assert "strict" in error["message"]


async def test_a_form_that_is_unknown_is_refused():
    async with served("x", "{{ tools }}{{ messages }}") as server:
        error = await server.refusal(PATH, {"messages": [USER], "tools": TOOLS})
        assert "--tool-call-parser" in error["message"]
    async with served("x", templates.CHATML, tool_call_parser="mistral") as server:
        error = await server.refusal(PATH, {"messages": [USER], "tools": TOOLS})
        assert "takes no tools" in error["message"]


async def test_reasoning_ends_after_its_budget() -> None:
    script = "<think>\nLet me see.</think>Yes."
    async with served(script, obeys_masks=True) as server:
        for budget in (0, 4, 30):
            choice = await whole_and_streamed(server, script, thinking_token_budget=budget)
            shown = "\nLet me see."[:budget]
            assert (choice["message"]["reasoning"] or "") == shown.strip("\n")
            rest = script[len("<think>") + len(shown) + len("</think>") :]
            assert choice["message"]["content"] == rest
        kept = await whole_and_streamed(server, script, thinking_token_budget=4, separate_reasoning=False)
        assert kept["message"]["content"].startswith("<think>\nLet</think>")
        several = await server.post(PATH, messages=[USER], n=3, thinking_token_budget=2, max_tokens=40)
        assert {one["message"]["reasoning"] for one in several["choices"]} == {"L"}
        assert several["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


async def test_channels_share_a_budget() -> None:
    async with served(HARMONY, HARMONY_TEMPLATE, obeys_masks=True) as server:
        choice = await whole_and_streamed(server, HARMONY, thinking_token_budget=1)
        assert choice["message"]["reasoning"] == "S"


@pytest.mark.parametrize(
    ("template", "body", "says"),
    [
        (TEMPLATE, {BUDGET: -1}, "must lie in 0.."),
        (TEMPLATE, {BUDGET: 3, "response_format": {"type": "json_object"}}, "response_format"),
        (TEMPLATE, {BUDGET: 3, "tools": TOOLS, **REQUIRED}, "tools"),
        (TEMPLATE, {BUDGET: 0, "use_beam_search": True}, "use_beam_search"),
        (PLAIN_TEMPLATE, {BUDGET: 0}, "--reasoning-parser"),
    ],
)
async def test_budgets_that_can_not_be_kept_are_refused(template: str, body: dict[str, Any], says: str) -> None:
    async with served("x", template) as server:
        error = await server.refusal(PATH, {"messages": [USER]} | body)
        assert error["param"] == BUDGET
        assert says in error["message"]
        assert not server.core.has_work


async def test_completions_have_no_budget(server: InLoop) -> None:
    for budget in (0, 5):
        error = await server.refusal("/v1/completions", {"prompt": "hi", BUDGET: budget})
        assert error["param"] == BUDGET
