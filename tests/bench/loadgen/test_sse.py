"""Event streams: what carried how many tokens."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.loadgen.sse import _events, describe_non_stream, error_message, read_stream, spread


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
    events, _ = _events(body)
    assert [e.data for e in events] == [b'{\n"a": 1}', b"[DONE]"]
    assert events[-1].last == len(body) - 1


def test_an_event_cut_in_the_middle_is_not_there() -> None:
    whole = event(text("a")) + event(text("b"))
    answer = read_stream(whole[:-5])
    assert answer.tokens == [1]
    assert not answer.ended
    assert not answer.malformed


@pytest.mark.parametrize(
    "data",
    [
        "{nonsense", "[1]", '"x"', "ping", '{"choices": 3}', '{"choices": [3]}', '{"choices": [{"text": 3}]}', "\xff",
        '{"choices": [], "usage": {"completion_tokens": -1}}', '{"choices": [], "usage": {"completion_tokens": 1e300}}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_malformed_events_end_the_stream(data: str) -> None:
    answer = read_stream(event(text("a")) + b"data: " + data.encode("latin-1") + b"\n\n" + event(text("b")))
    assert answer.tokens == [1]
    assert "cannot be parsed" in answer.malformed


@pytest.mark.parametrize(
    "between",
    [
        b": keep-alive\n\n", b":\n\n", b"data:\n\n", b"data: \n\n", b"data\n\n", b"\n\n\n", b"event: ping\n\n",
        b"event: ping\ndata: 2024-01-01\n\n", b'event: ping\ndata: {"type": "ping"}\n\n', b"retry: 100\n\n",
        b"data: {}\n\n", b"data: null\n\n", b'data: ""\n\n', b'data: {"choices": [{}]}\n\n', b"id: 7\ndata:\n\n",
        b'data: {"choices": [], "prompt_filter_results": []}\n\n', b'data: {"choices": null}\n\n',
        b'data: {"choices": [{"index": 0, "content_filter_results": {}, "finish_reason": null}]}\n\n',
        b"unknown: x\n\n", b'data: {"type": "ping"}\n\n',
    ],
)  # fmt: skip
def test_events_that_are_no_chunks_are_passed_over(between: bytes) -> None:
    body = between + event(text("a")) + between + event(text("b", "length")) + between + event(usage(2)) + DONE
    answer = read_stream(body)
    assert (answer.tokens, answer.completion_tokens, answer.ended) == ([1, 1], 2, True)
    assert (answer.malformed, answer.error) == ("", "")
    assert body[: answer.places[0] + 1] == between + event(text("a"))


@pytest.mark.parametrize(
    "opening",
    [
        delta(role="assistant"), delta(role="assistant", content=""), delta(role="assistant", content=None), delta(),
        delta(content=""), delta(content=None), text(""), delta(tool_calls=[]),
        {"choices": [{"index": 0, "text": None}]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("counted", [False, True])
def test_an_empty_first_chunk_is_not_the_first_token(opening: dict[str, Any], counted: bool) -> None:
    chat = "delta" in opening["choices"][0]
    part = (lambda words: delta(content=words)) if chat else text
    for sizes in ([1, 1, 1], [2, 1, 1], [3, 4]):
        messages = [opening, *(part("ab" * size) for size in sizes)]
        messages[-1]["choices"][0]["finish_reason"] = "stop"
        body = stream(*messages, *([usage(sum(sizes))] if counted else []))
        answer = read_stream(body)
        assert answer.tokens == (sizes if counted else [1] * len(sizes))
        assert body[: answer.places[0] + 1] == event(messages[0]) + event(messages[1])


def test_an_empty_first_chunk_that_names_its_token_is_one() -> None:
    named = [text("", token_ids=[7]), text("é", token_ids=[8]), text("x", "length", token_ids=[9])]
    answer = read_stream(stream(*named, usage(3)))
    assert answer.tokens == [1, 1, 1]
    assert answer.places[0] == len(event(named[0])) - 1


def test_an_answer_of_empty_texts_alone_keeps_its_tokens() -> None:
    assert read_stream(stream(text(""), text(""), text("", "length"), usage(3))).tokens == [1, 1, 1]


def test_all_that_is_generated_counts() -> None:
    call = [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]
    part = [{"index": 0, "function": {"arguments": '{"a"'}}]
    for fields in (
        {"reasoning_content": "hm"}, {"reasoning": "hm"}, {"tool_calls": call}, {"tool_calls": part}, {"refusal": "no"},
        {"function_call": {"arguments": "{"}}, {"content": [{"type": "text", "text": "hi"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]},
    ):  # fmt: skip
        body = stream(delta(role="assistant", content=""), delta(**fields), delta(content="x"), delta("stop"))
        answer = read_stream(body)
        assert answer.tokens == [1, 1], fields
        assert body[: answer.places[0] + 1].count(b"\n\n") == 2


def test_what_ends_for_its_length_has_the_length_asked() -> None:
    """Where the server counts nothing (no usage), chunks of several tokens would else be one each."""
    body = stream(text("x" * 9), text("x" * 3, "length"))
    assert read_stream(body, 8).tokens == [6, 2]
    assert read_stream(body, 1).tokens == [1, 1]
    assert read_stream(stream(text("x" * 9), text("x" * 3, "stop")), 8).tokens == [1, 1]


@pytest.mark.parametrize("first", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("second", ["\n", "\r\n", "\r"])
def test_mixed_line_ends(first: str, second: str) -> None:
    lines = [b"event: message", b'data: {"choices": [{"index": 0,', b'data: "text": "a"}]}']
    body = b"\xef\xbb\xbf" + first.encode().join(lines) + first.encode() + second.encode() + b"data: [DONE]\r\n\r\n"
    answer = read_stream(body)
    if first + second == "\r\n":  # one line end: the data goes on, and no JSON is followed by more
        assert "cannot be parsed" in answer.malformed
        return
    assert (answer.tokens, answer.ended, answer.malformed) == ([1], True, "")


@pytest.mark.parametrize(
    "last", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n", event(text("b", "stop")).strip()]
)
def test_a_last_event_without_its_blank_line(last: bytes) -> None:
    answer = read_stream(event(text("a")) + event(text("c")) + last)
    assert answer.ended
    assert answer.tokens == [1, 1] + [1] * (b"text" in last)


def test_errors_in_the_stream() -> None:
    assert read_stream(event({"error": {"message": "died", "code": 500}})).error == "died"
    assert read_stream(event({"error": "died"})).error == "died"
    assert read_stream(event({"object": "error", "message": "died", "code": 500})).error == "died"
    assert read_stream(event({"detail": "died"})).error == "died"
    assert read_stream(event(text("a")) + b"event: error\ndata: died\n\n" + DONE).error == "died"
    assert read_stream(b'event: error\ndata: {"message": "died"}\n\n').error == "died"
    assert "finish reason 'abort'" in read_stream(stream(text("a"), text("", "abort"))).error
    assert read_stream(stream(text("a"), {"error": {"message": "x" * 900}}, text("b"))).error == "x" * 200 + " …"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too many"}}', "too many"),
        (b'{"message": "too many"}', "too many"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>bad\ngateway</html>", "<html>bad gateway</html>"),
        (b"<html><head><title>502 Bad\nGateway</title></head><body>x", "502 Bad Gateway"),
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


@pytest.mark.parametrize(
    ("body", "media", "words"),
    [
        (b"", "text/event-stream", "an empty body"),
        (b"<!doctype html><title>Sign in</title>", "text/html", "a page instead of a stream: Sign in"),
        (b"<h1>hello</h1>", "", "a page instead of a stream: <h1>hello</h1>"),
        (b'{"object": "text_completion", "choices": [{"text": "a"}]}', "application/json", "one JSON object"),
        (
            b'{"error": {"message": "no such model"}}',
            "application/json",
            "with JSON instead of a stream: no such model",
        ),
        (b"[1, 2]", "", "with JSON instead of a stream: [1, 2]"),
        (b'{"response": "a"}\n{"response": "b"}\n', "application/x-ndjson", "lines of JSON"),
        (b"Hello there", "text/plain", "text of type text/plain that contains no events: Hello there"),
    ],
)
def test_what_a_200_is_that_is_no_stream(body: bytes, media: str, words: str) -> None:
    assert read_stream(body).events == 0
    assert words in describe_non_stream(body, media)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_raising(body: bytes) -> None:
    answer = read_stream(b"data: " + body + b"\n\n")
    assert len(answer.places) == len(answer.tokens)
