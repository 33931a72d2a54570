"""Chat templates, with transformers' apply_chat_template as the reference."""

import logging
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from engine.errors import RequestError
from engine.frontend.chat_template import ChatTemplate
from engine.frontend.conversation import shape_conversation
from tests.engine.frontend import templates
from tests.engine.frontend.conftest import byte_level_library

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
SYSTEM = {"role": "system", "content": " Be brief. "}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <numbers>", "parameters": {"type": "object", "properties": {}}},
}
DOCUMENT = {"title": "Sums", "text": "2 + 3 = 5"}


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}}],
    } | more


RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "5"}


def ours(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    return ChatTemplate(source, SPECIAL).render(shape_conversation(messages), **options)


REFERENCE = PreTrainedTokenizerFast(tokenizer_object=byte_level_library(), **SPECIAL)


def reference(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    options = {"add_generation_prompt": True, **options}
    written = REFERENCE.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    assert isinstance(written, str)
    return written


def as_parts(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


@pytest.mark.parametrize("name", templates.ALL)
@pytest.mark.parametrize("messages", [[USER], [USER, ANSWER, USER]], ids=["one", "several"])
@pytest.mark.parametrize("generation", [True, False])
def test_a_conversation_reads_as_the_reference_writes_it(name: str, messages: list[dict[str, Any]], generation: bool):
    source = templates.ALL[name]
    taken = messages if name not in templates.PARTS_ONLY else [as_parts(message) for message in messages]
    wanted = reference(source, taken, add_generation_prompt=generation)
    assert "2 + 3" in wanted
    parts = [as_parts(message) for message in messages]
    for given in (messages, parts, [*parts[:1], *messages[1:]]):
        assert ours(source, given, add_generation_prompt=generation) == wanted


@pytest.mark.parametrize("name", ["chatml", "qwen", "llama", "smolvlm", "llama-vision"])
def test_each_role_gets_the_form_it_takes(name: str):
    """A system message may take another form than users' do."""
    source = templates.ALL[name]
    forms = as_parts if name in templates.PARTS_ONLY else dict
    wanted = reference(source, [forms(SYSTEM), forms(USER)])
    assert "Be brief" in wanted
    assert ours(source, [SYSTEM, USER]) == ours(source, [as_parts(SYSTEM), as_parts(USER)]) == wanted


def test_parts_that_a_template_takes_are_its_own_to_join():
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    for name in ("smolvlm", "llama-guard", "llama-vision"):
        assert ours(templates.ALL[name], [parts]) == reference(templates.ALL[name], [parts])
    assert ours(templates.CHATML, [parts]) == reference(templates.CHATML, [{"role": "user", "content": "a\nb"}])


def test_a_content_that_a_template_quotes_is_no_written_list():
    source = "{% for message in messages %}{{ message.role }}: '{{ message.content }}' {% endfor %}"
    assert ours(source, [as_parts(USER), as_parts(SYSTEM)]) == "user: 'What is 2 + 3?' system: ' Be brief. ' "


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_what_is_absent_is_none(name: str):
    source = templates.ALL[name]
    plain = ours(source, [USER])
    assert plain == reference(source, [USER])
    assert "ipython" not in plain
    assert ours("{{ tools is none }} {{ documents is none }} {{ tools is defined }}", [USER]) == "True True True"
    with_tools = ours(source, [USER], tools=[TOOL])
    assert with_tools == reference(source, [USER], tools=[TOOL])
    assert with_tools != plain


def test_documents():
    wanted = reference(templates.LLAMA, [USER], documents=[DOCUMENT])
    assert "Document: Sums 2 + 3 = 5" in wanted
    assert ours(templates.LLAMA, [USER], documents=[DOCUMENT]) == wanted
    with pytest.raises(RequestError, match="no documents") as caught:
        ours(templates.CHATML, [USER], documents=[DOCUMENT])
    assert caught.value.field == "documents"


@pytest.mark.parametrize("arguments", ['{"a": 2, "b": "é"}', {"a": 2, "b": "é"}, "{}", "", None])
@pytest.mark.parametrize("content", ["absent", None, ""])
@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_histories_with_calls(name: str, arguments: Any, content: Any):
    source = templates.ALL[name]
    more = {} if content == "absent" else {"content": content}
    parsed = {"a": 2, "b": "é"} if arguments and arguments != "{}" else {}
    wanted = reference(source, [USER, call(parsed, **more), RESULT])
    assert ours(source, [USER, call(arguments, **more), RESULT]) == wanted
    assert ours(source, [USER, call(arguments, **more), as_parts(RESULT)]) == wanted
    assert "add" in wanted
    assert "None" not in wanted


def test_a_content_that_is_none_is_kept_for_templates_that_test_it():
    written = ours(templates.DEEPSEEK, [USER, call('{"a": 2}', content=None), RESULT])
    assert written == '<s><|User|>What is 2 + 3?<|call|>add{"a": 2}<|output|>5<|Assistant|>'


def test_nothing_is_written_as_the_word_none():
    history = [USER, call({}, content=None, name=None, refusal=None), RESULT, ANSWER | {"tool_calls": None}]
    assert ours(templates.QWEN, history) == reference(templates.QWEN, history)
    assert not any("None" in ours(source, history) for source in (templates.QWEN, templates.CHATML))


@pytest.mark.parametrize("calls", [[], None])
def test_empty_calls_are_none(calls: Any):
    """Llama's template asks whether a message has the field at all."""
    history = [USER, ANSWER | {"tool_calls": calls}, USER]
    assert ours(templates.LLAMA, history) == reference(templates.LLAMA, [USER, ANSWER, USER])


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "assistant", "tool_calls": "x"}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"type": "function"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[1].tool_calls[0].function.name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}, "messages[1].tool_calls[0].function.name"),
        ({"role": "assistant", "tool_calls": [{"type": "x"}]}, "messages[1].tool_calls[0].type"),
        (call("{"), "messages[1].tool_calls[0].function.arguments"),
        (call("[1]"), "messages[1].tool_calls[0].function.arguments"),
        (call('{"a": "\\ud800"}'), "messages[1].tool_calls[0].function.arguments"),
        (call("[" * 100_000), "messages[1].tool_calls[0].function.arguments"),
        (call(5), "messages[1].tool_calls[0].function.arguments"),
        (call("{}", role="user"), "messages[1].tool_calls"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[1].function_call"),
        ({"role": "", "content": "x"}, "messages[1].role"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "messages[1].tool_call_id"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages[1].content"),
        ("x", "messages[1]"),
    ],
)
def test_malformed_messages_name_their_field(message: Any, field: str):
    with pytest.raises(RequestError) as caught:
        shape_conversation([USER, message])
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["chatml", "qwen", "gemma", "llama", "smolvlm", "llama-vision"])
@pytest.mark.parametrize("end", ["The sum", "The sum is  "])
def test_a_final_message_is_continued(name: str, end: str):
    source = templates.ALL[name]
    begun = {"role": "assistant", "content": end}
    taken = [as_parts(one) for one in (USER, begun)] if name in templates.PARTS_ONLY else [USER, begun]
    wanted = reference(source, taken, continue_final_message=True, add_generation_prompt=False)
    assert wanted.rstrip().endswith(end.rstrip())
    for given in ([USER, begun], [as_parts(USER), as_parts(begun)]):
        assert ours(source, given, continue_final_message=True, add_generation_prompt=False) == wanted


@pytest.mark.parametrize(
    ("source", "last", "options"),
    [
        (templates.CHATML, ANSWER, {"add_generation_prompt": True}),
        (templates.QWEN, call("{}"), {"add_generation_prompt": False}),
        ("{{ messages[0].content }}", ANSWER, {"add_generation_prompt": False}),
        ("{{ messages[-1].content | upper }}", ANSWER, {"add_generation_prompt": False}),
    ],
)
def test_what_cannot_be_continued_is_refused(source: str, last: dict[str, Any], options: dict[str, Any]):
    with pytest.raises(RequestError) as caught:
        ours(source, [USER, last], continue_final_message=True, **options)
    assert caught.value.field == "continue_final_message"


def test_further_variables_reach_the_template_and_unused_ones_are_logged(caplog: pytest.LogCaptureFixture):
    source = templates.LLAMA_GUARD
    extra = {"excluded_category_keys": ["S1", "S2"], "a name that nothing uses": 1}
    wanted = reference(source, [as_parts(USER)], excluded_category_keys=["S1", "S2"])
    assert wanted.endswith("S1,S2")
    assert [ours(source, [USER], extra=extra) for _ in range(2)] == [wanted, wanted]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "a name that nothing uses" in record.getMessage()
    assert ours("{{ bos_token }}", [USER], extra={"bos_token": "mine"}) == "mine"


def test_reasoning_effort_and_reasoning():
    source = "{{ reasoning_effort }}"
    source += "{% for message in messages %}{{ message.reasoning_content }}{{ message.thinking }}{% endfor %}"
    assert ours(source, [USER], reasoning_effort="high") == "high"
    with pytest.raises(RequestError) as caught:
        ours(templates.CHATML, [USER], reasoning_effort="high")
    assert caught.value.field == "reasoning_effort"
    assert ours(templates.CHATML, [USER], reasoning_effort="none") == ours(templates.CHATML, [USER])
    history = [USER, ANSWER | {"reasoning": "2, then 3"}]
    assert ours(source, history) == reference(source, history) == "2, then 32, then 3"


def test_templates_by_name():
    template = ChatTemplate("default", {}, {"tool_use": "tools: {{ tools | length }}", "rag": "documents"})
    assert template.render([USER]) == "default"
    assert template.render([USER], tools=[TOOL]) == "tools: 1"
    assert template.render([USER], template="rag") == "documents"
    assert template.render([USER], template="{{ messages | length }} given") == "1 given"
    for broken in ("{% for %}", "{{ " + "(" * 5000):
        with pytest.raises(RequestError) as caught:
            template.render([USER], template=broken)
        assert caught.value.field == "chat_template"


@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ '\\ud800' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_reaches_nothing_of_the_program(source: str):
    with pytest.raises(RequestError) as caught:
        ours(source, [USER])
    assert caught.value.field == "messages"
    for name in ("namespace.__init__", "dict.__class__", "raise_exception.__globals__", "tools.__class__"):
        assert ours(f"{{{{ {name} }}}}", [USER]) == ""


def test_what_templates_may_use():
    source = "{% set n = namespace(a=1, self=2) %}{% set n.b = dict(c=3) %}{{ n.a + n.self + n.b.c }}"
    source += "{{ dict.fromkeys('a') }}"
    source += "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}"
    source += "{{ {'b': '<é>', 'a': 1} | tojson(indent=1, sort_keys=true) }}"
    source += "{{ {'a': 1} | tojson(separators=(',', ':')) }}"
    assert ours(source, [USER]) == reference(source, [USER])
