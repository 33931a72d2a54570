"""Messages of Anthropic's API as messages of a chat, and the places of errors."""

from typing import Any

import pytest

from engine.api.messages.conversation import ChatMessages
from engine.errors import RequestError

USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": 1}}
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}}
LINK = {"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}}
PNG_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}


def text(written: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": written, **more}


def result(content: Any = None, **more: Any) -> dict[str, Any]:
    given = {} if content is None else {"content": content}
    return {"type": "tool_result", "tool_use_id": "toolu_1", **given, **more}


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def shaped(*messages: Any, system: Any = None) -> list[dict[str, Any]]:
    return ChatMessages(system, list(messages)).messages


@pytest.mark.parametrize("content", ["hi", [text("hi")], [text("hi", cache_control={"type": "ephemeral"})]])
def test_one_text_is_the_content(content: Any):
    assert shaped({"role": "user", "content": content}) == [USER]
    assert shaped(USER, system=content) == [{"role": "system", "content": "hi"}, USER]


def test_several_blocks_are_parts_in_their_order():
    link = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
    assert shaped(user(PNG, text("a"), LINK)) == [{"role": "user", "content": [PNG_PART, text("a"), link]}]
    system = [text("a"), text("b")]
    assert shaped(USER, system=system)[0] == {"role": "system", "content": system}


def test_messages_of_the_user_that_follow_each_other_are_one():
    assert shaped(USER, user(PNG), USER) == [{"role": "user", "content": [text("hi"), PNG_PART, text("hi")]}]


def test_a_turn_of_the_assistant():
    thought = {"type": "thinking", "thinking": "So.", "signature": "x"}
    call = {"id": "toolu_1", "type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    whole = shaped(USER, assistant(thought, text("Wait."), CALL), user(result("5")))
    assert whole[1:] == [
        {"role": "assistant", "content": "Wait.", "tool_calls": [call], "reasoning_content": "So."},
        {"role": "tool", "content": "5", "tool_call_id": "toolu_1"},
    ]
    assert shaped(USER, assistant(CALL))[1]["content"] is None
    hidden = {"type": "thinking", "thinking": "", "signature": ""}
    assert "reasoning_content" not in shaped(USER, assistant(hidden, text("a")))[1]


@pytest.mark.parametrize(
    ("given", "content"),
    [
        (result("5"), "5"),
        (result([text("5")]), "5"),
        (result(), ""),
        (result([]), ""),
        (result([text("a"), PNG]), [text("a"), PNG_PART]),
        (result("no", is_error=True), "Error: no"),
        (result([text("no"), PNG], is_error=True), [text("Error: no"), PNG_PART]),
        (result([PNG], is_error=True), [text("Error: "), PNG_PART]),
        (result(is_error=True), "Error: "),
        (result("5", is_error=False, cache_control={"type": "ephemeral"}), "5"),
    ],
)
def test_results_of_tools(given: dict[str, Any], content: Any):
    assert shaped(USER, assistant(CALL), user(given))[-1]["content"] == content


def test_results_and_texts_of_one_message_keep_their_order():
    other = CALL | {"id": "toolu_2"}
    second = result("6") | {"tool_use_id": "toolu_2"}
    found = shaped(USER, assistant(CALL, other), user(result("5"), second, text("Now?")))
    assert [(one["role"], one["content"]) for one in found[2:]] == [("tool", "5"), ("tool", "6"), ("user", "Now?")]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([{"role": "system", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([USER | {"name": "x"}], "messages[0].name"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([user("x")], "messages[0].content[0].type"),
        ([user({"type": ["text"]})], "messages[0].content[0].type"),
        ([user({"type": "document", "source": {}})], "messages[0].content[0].type"),
        ([user(text("a"), {"type": "text"})], "messages[0].content[1].text"),
        ([user({"type": "text", "text": 5})], "messages[0].content[0].text"),
        ([user(text("a", citations=[{"type": "x"}]))], "messages[0].content[0].citations"),
        ([user({"type": "image"})], "messages[0].content[0].source"),
        ([user({"type": "image", "source": {"type": "file"}})], "messages[0].content[0].source.type"),
        ([user({"type": "image", "source": {"type": {}}})], "messages[0].content[0].source.type"),
        ([user({"type": "image", "source": {"type": "url"}})], "messages[0].content[0].source.url"),
        (
            [user({"type": "image", "source": PNG["source"] | {"media_type": "text/html"}})],  # type: ignore[operator]
            "messages[0].content[0].source.media_type",
        ),
        ([user(result("5"))], "messages[0].content[0].tool_use_id"),
        ([USER, assistant(CALL), user(result([{"type": "document"}]))], "messages[2].content[0].content[0].type"),
        ([USER, assistant(CALL), user(result("5", is_error="yes"))], "messages[2].content[0].is_error"),
        ([USER, assistant(CALL | {"input": "{}"})], "messages[1].content[0].input"),
        ([USER, assistant({"type": "redacted_thinking", "data": "x"})], "messages[1].content[0].type"),
        ([USER, assistant(PNG)], "messages[1].content[0].type"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(messages: list[Any], field: str):
    with pytest.raises(RequestError) as caught:
        ChatMessages(None, messages)
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize("system", [5, [PNG], ["x"], [{"type": "text"}]])
def test_a_system_prompt_is_text(system: Any):
    with pytest.raises(RequestError, match=r"^system"):
        ChatMessages(system, [USER])


def test_errors_of_the_chat_get_the_places_of_the_request():
    found = ChatMessages(
        [text("a"), text("b")], [USER, assistant(text("c"), CALL), user(result([PNG]), text("d"), PNG)]
    )
    assert [one["role"] for one in found.messages] == ["system", "user", "assistant", "tool", "user"]
    for place, restored in {
        "messages[0].content[1].text": "system[1].text",
        "messages[1].content": "messages[0].content",
        "messages[2].content": "messages[1].content[0]",
        "messages[2].tool_calls[0]": "messages[1].tool_calls[0]",
        "messages[3].content[0].image_url.url": "messages[2].content[0].content[0].source",
        "messages[4].content[0].text": "messages[2].content[1].text",
        "messages[4].content[1]": "messages[2].content[2].source",
        "messages[4]": "messages[2]",
        "messages[9].content": "messages[9].content",
    }.items():
        assert found.restore_places(f"{place}: no") == f"{restored}: no"
