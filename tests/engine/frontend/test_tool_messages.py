"""Tools for templates that know nothing of them, and ids for those that take only some."""

import json
import re
from typing import Any

import pytest

from engine.errors import RequestError
from engine.frontend.chat_template import ChatTemplate
from engine.frontend.conversation import shape_conversation
from engine.frontend.parsing.call_ids import new_mistral_id, with_mistral_ids
from engine.frontend.tool_messages import describe_tools, write_calls
from tests.engine.frontend import templates

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "hi"}


def call(number: int, content: Any = None) -> dict[str, Any]:
    function = {"name": "f", "arguments": json.dumps({"a": number})}
    one = {"id": f"call_{number}", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [one]}


def result(number: int, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": content}


def test_tools_are_described_in_the_system_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    [first, second] = describe_tools([system, USER], [TOOL])
    assert first["content"].startswith("Be brief.\n\n")
    assert json.dumps(TOOL) in first["content"]
    assert second == USER
    [added, _] = describe_tools([USER], [TOOL])
    assert (added["role"], added["content"]) == ("system", first["content"].removeprefix("Be brief.\n\n"))
    parts = [{"type": "text", "text": "Be brief."}]
    assert describe_tools([system | {"content": parts}, USER], [TOOL]) == [first, USER]


def test_calls_and_results_are_texts() -> None:
    messages = shape_conversation([USER, call(1, "Wait."), result(1, "x"), result(2, "y"), call(3), result(3, None)])
    written = write_calls(messages)
    assert [one["role"] for one in written] == ["user", "assistant", "user", "assistant", "user"]
    assert all("tool_calls" not in one for one in written)
    assert written[1]["content"] == 'Wait.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert written[2]["content"] == ("<tool_response>\nx\n</tool_response>\n<tool_response>\ny\n</tool_response>")
    assert written[3]["content"].startswith("<tool_call>")
    assert written[4]["content"] == "<tool_response>\n\n</tool_response>"


def test_results_in_parts_stay_parts() -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "image"}]
    [one] = write_calls([result(1, parts), result(2, "y")])
    texts = [part.get("text", part["type"]) for part in one["content"]]
    assert "".join(texts) == "<tool_response>\nximage\n</tool_response>\n<tool_response>\ny\n</tool_response>"


@pytest.mark.parametrize("content", ["sunny", [{"type": "text", "text": "sunny"}], None])
def test_a_history_with_calls_in_a_template_without(content: Any) -> None:
    template = ChatTemplate(templates.CHATML, {})
    written = template.render(shape_conversation([USER, call(1), result(1, content)]))
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in written
    assert f"<tool_response>\n{'sunny' if content else ''}\n</tool_response>" in written
    described = template.render([USER], tools=[TOOL], tools_as_text=True)
    assert json.dumps(TOOL) in described
    assert json.dumps(TOOL) not in template.render([USER], tools=[TOOL])


def test_templates_that_write_tools_do_it_themselves() -> None:
    template = ChatTemplate(templates.QWEN, {})
    messages = shape_conversation([USER, call(1), result(1, "x")])
    assert template.render(messages, tools=[TOOL], tools_as_text=True) == template.render(messages, tools=[TOOL])


def test_ids_that_mistral_s_formats_accept() -> None:
    messages = [with_mistral_ids(one) for one in (call(1), result(1, "x"), call(2))]
    ids = [messages[0]["tool_calls"][0]["id"], messages[1]["tool_call_id"], messages[2]["tool_calls"][0]["id"]]
    assert all(re.fullmatch("[A-Za-z0-9]{9}", one) for one in ids)
    assert ids[0] == ids[1] != ids[2]
    own = new_mistral_id()
    assert with_mistral_ids({"tool_call_id": own}) == {"tool_call_id": own}
    strict = (
        "{% for message in messages %}{% if message.tool_call_id is defined and message.tool_call_id | length != 9 %}"
        "{{ raise_exception('ids have length 9') }}{% endif %}{{ message.role }}{{ tools }}{% endfor %}"
    )
    assert "tool" in ChatTemplate(strict, {}).render([USER, result(1, "x")])
    with pytest.raises(RequestError, match="ids have length 9"):
        ChatTemplate(strict.replace(" != ", "!="), {}).render([USER, result(1, "x")])
