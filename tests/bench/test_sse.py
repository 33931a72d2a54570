"""Event streams: what carried how many tokens."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sse import error_message, read_stream, split_events, spread


def event(message: Any, end: str = "\n") -> bytes:
    return f"data: {json.dumps(message)}{end}{end}".encode()


def text(value: str, finish: str | None = None, **extra: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": value, "finish_reason": finish, **extra}]}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def usage(completion: int, prompt: int = 5, **extra: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **extra}}


DONE = b"data: [DONE]\n\n"


def stream(*messages: Any) -> bytes:
    return b"".join(event(m) for m in messages) + DONE


def test_a_token_a_chunk() -> None:
    body = stream(text("a"), text(""), text("c", "length"), usage(3, prompt_tokens_details={"cached_tokens": 2}))
    answer = read_stream(body)
    assert answer.tokens == [1, 1, 1]
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (5, 3, 2)
    assert answer.ended
    assert not answer.malformed
    assert [body[: place + 1].count(b"\n\n") for place in answer.places] == [1, 2, 3]
    assert all(body[place - 1 : place + 1] == b"\n\n" for place in answer.places)


def test_a_finish_reason_of_its_own_is_no_token() -> None:
    assert read_stream(stream(text("a"), text("b"), text("", "stop"), usage(2))).tokens == [1, 1]
    assert read_stream(stream(text("a"), text("b"), text("", "stop"), usage(3))).tokens == [1, 1, 1]


def test_a_chat_opening_is_no_token() -> None:
    body = stream(delta(role="assistant", content=""), delta(content="a"), delta(content="b"), delta("stop"), usage(2))
    assert read_stream(body).tokens == [1, 1]


def test_reasoning_and_tool_calls_are_tokens() -> None:
    calls = [{"index": 0, "function": {"arguments": "{}"}}]
    body = stream(delta(reasoning_content="hm"), delta(tool_calls=calls), delta(content="x"), usage(3))
    assert read_stream(body).tokens == [1, 1, 1]


def test_chunks_that_say_their_tokens() -> None:
    said = stream(
        text("abc", logprobs={"tokens": ["a", "b", "c"]}), text("d", "length", logprobs={"tokens": ["d"]}), usage(4)
    )
    assert read_stream(said).tokens == [3, 1]
    assert read_stream(stream(text("abc", token_ids=[1, 2]), text("d", token_ids=[3]), usage(3))).tokens == [2, 1]


def test_tokens_are_spread_over_text() -> None:
    assert read_stream(stream(text("x" * 12), text("x" * 4), usage(8))).tokens == [6, 2]
    assert read_stream(stream(text("abcd"), text("", "stop"), usage(7))).tokens == [7]


def test_without_usage_a_chunk_is_a_token() -> None:
    assert read_stream(stream(text("a"), text("b"), text("", "stop"))).tokens == [1, 1]


def test_usage_beside_the_choices() -> None:
    both = text("a", "length") | {"usage": {"prompt_tokens": 4, "completion_tokens": 1}}
    answer = read_stream(stream(both))
    assert (answer.tokens, answer.prompt_tokens) == ([1], 4)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_comments_and_joined_data(end: str) -> None:
    lines = [": ping", "", "event: x", "data: {", 'data:"a": 1}', "id: 3", "", "retry: 5", "", "data: [DONE]", "", ""]
    body = end.join(lines).encode()
    events = split_events(body)
    assert [e.data for e in events] == [b'{\n"a": 1}', b"[DONE]"]
    assert events[-1].last == len(body) - 1


def test_an_event_cut_in_the_middle_is_not_there() -> None:
    whole = event(text("a")) + event(text("b"))
    answer = read_stream(whole[:-5])
    assert answer.tokens == [1]
    assert not answer.ended
    assert not answer.malformed


@pytest.mark.parametrize("data", ["{nonsense", "[1]", '"x"', "{}", '{"choices": 3}', '{"choices": [{}]}', "\xff"])
def test_malformed_events_end_the_stream(data: str) -> None:
    answer = read_stream(event(text("a")) + b"data: " + data.encode("latin-1") + b"\n\n" + event(text("b")))
    assert answer.tokens == [1]
    assert "can't be read" in answer.malformed


def test_errors_in_the_stream() -> None:
    assert read_stream(event({"error": {"message": "died", "code": 500}})).error == "died"
    assert read_stream(event({"error": "died"})).error == "died"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too many"}}', "too many"),
        (b'{"message": "too many"}', "too many"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>bad\ngateway</html>", "<html>bad gateway</html>"),
        (b'{"a": 1}', '{"a": 1}'),
        (b"", ""),
        (b"x" * 500, "x" * 200 + " …"),
    ],
)
def test_error_messages(body: bytes, message: str) -> None:
    assert error_message(body) == message


@given(st.integers(0, 500), st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_spread_keeps_the_total(total: int, weights: list[int]) -> None:
    counts = spread(total, weights)
    assert sum(counts) == total
    assert all(count >= (1 if total >= len(weights) else 0) for count in counts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.booleans())
def test_tokens_sum_to_the_usage(sizes: list[int], closing: bool) -> None:
    messages = [text("ab" * size) for size in sizes]
    if closing:
        messages.append(text("", "stop"))
    answer = read_stream(stream(*messages, usage(sum(sizes))))
    assert sum(answer.tokens) == sum(sizes)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_raising(body: bytes) -> None:
    answer = read_stream(b"data: " + body + b"\n\n")
    assert len(answer.places) == len(answer.tokens)
