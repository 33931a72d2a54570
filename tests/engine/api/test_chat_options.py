"""What a chat says of how it is written as a prompt; /tokenize shows the prompt."""

from typing import Any

import httpx
import pytest

from engine.api.app import create_app
from engine.api.http_options import HttpOptions
from engine.api.state import ApiState
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.fake_executor import expected_tokens
from tests.engine.frontend import templates

USER = {"role": "user", "content": "hi"}
BEGUN = {"role": "assistant", "content": "so"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SHOWS_ALL = (
    "{% for document in documents or [] %}[{{ document.text }}]{% endfor %}"
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"
    "{{ mood }}{% if add_generation_prompt %}a:{% endif %}"
)


async def written(server: InLoop, messages: list[dict[str, Any]], **options: Any) -> str:
    """The prompt of a conversation; a chat must be answered from the same prompt."""
    tokens = (await server.post("/tokenize", messages=messages, **options))["tokens"]
    chat = await server.post("/v1/chat/completions", messages=messages, max_tokens=3, return_token_ids=True, **options)
    assert chat["choices"][0]["token_ids"] == expected_tokens(tokens, 3)
    assert chat["usage"]["prompt_tokens"] == len(tokens)
    return bytes(tokens).decode()


async def test_every_option_reaches_the_template():
    async with in_loop(template=SHOWS_ALL) as server:
        assert await written(server, [USER]) == "u:hi;a:"
        assert await written(server, [USER], add_generation_prompt=False) == "u:hi;"
        assert await written(server, [USER], documents=[{"title": "t", "text": "doc"}]) == "[doc]u:hi;a:"
        assert await written(server, [USER], tools=[TOOL], tool_choice="none") == "<f>u:hi;a:"
        assert await written(server, [USER], chat_template_kwargs={"mood": "!"}) == "u:hi;!a:"
        assert await written(server, [USER, BEGUN], continue_final_message=True) == "u:hi;a:so"
        empty: dict[str, Any] = {"documents": [], "tools": [], "chat_template_kwargs": {}, "chat_template": ""}
        assert await written(server, [USER], **empty, continue_final_message=False) == "u:hi;a:"
        assert await written(server, [USER], reasoning_effort="none") == "u:hi;a:"


@pytest.mark.parametrize("name", templates.PARTS_ONLY)
async def test_templates_of_parts_get_the_user_s_words(name: str):
    async with in_loop(template=templates.ALL[name], max_model_len=512) as server:
        text = await written(server, [USER])
        assert ": hi" in text
        assert await written(server, [USER | {"content": [{"type": "text", "text": "hi"}]}]) == text


OWN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_kwargs_that_name_our_own_arguments_are_refused(server: InLoop, path: str):
    for name in (*OWN, "extra", "template", "conversation"):
        error = await server.refusal(path, {"messages": [USER], "chat_template_kwargs": {name: True}})
        assert error["param"] == f"chat_template_kwargs.{name}"
    for name in ("self", "args", "kwargs", "", "a b", "class", "namespace", "range"):
        await server.post(path, messages=[USER], chat_template_kwargs={name: 1})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"documents": ["x"]}, "documents[0]"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [5]}]}, "messages[1].tool_calls[0]"),
    ],
)
async def test_options_that_cannot_hold(server: InLoop, fields: dict[str, Any], param: str):
    error = await server.refusal("/v1/chat/completions", {"messages": [USER], **fields})
    assert error["param"] == param
    assert not server.core.has_work


async def test_a_template_of_the_request_s_own_where_the_server_takes_such(server: InLoop):
    state = ApiState(server.client, ("fake",), HttpOptions(trust_request_chat_template=True))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(state)), base_url="http://test") as http:
        trusting = InLoop(server.app, server.client, server.core, http, state)
        assert await written(trusting, [USER], chat_template="{{ messages[0].content }}!") == "hi!"
        error = await trusting.refusal("/tokenize", {"messages": [USER], "chat_template": "{% for %}"})
        assert error["param"] == "chat_template"


async def test_special_tokens_may_be_added_to_what_the_template_wrote(server: InLoop):
    """The stand-in tokenizer has none: the option is taken, and the chat the same."""
    plain = await written(server, [USER])
    assert await written(server, [USER], add_special_tokens=True) == plain
