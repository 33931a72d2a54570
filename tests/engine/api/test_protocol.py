from typing import Any

import msgspec
import pytest

from engine.api.chat_protocol import ChatRequest
from engine.api.parsing import parse
from engine.api.protocol import CompletionRequest
from engine.errors import RequestError
from engine.frontend.conversation import shape_conversation


def body(**fields: Any) -> bytes:
    return msgspec.json.encode(fields)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_comes_in_four_forms(prompt: Any, prompts: Any):
    assert parse(body(prompt=prompt), CompletionRequest).prompts() == prompts


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], "a"]])
def test_other_forms_are_refused(prompt: Any):
    with pytest.raises(RequestError) as caught:
        parse(body(prompt=prompt), CompletionRequest).prompts()
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": [[1, "x"]]}, "prompt[0][1]"),
        ({"prompt": "a", "max_tokens": "five"}, "max_tokens"),
        ({"prompt": "a", "temperature": "warm"}, "temperature"),
        ({"prompt": "a", "stream": 5}, "stream"),
        ({"prompt": "a", "stop": [1]}, "stop[0]"),
        ({"prompt": "a", "stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
        ({}, "prompt"),
    ],
)
def test_a_wrong_type_names_its_field(fields: dict[str, Any], field: str):
    with pytest.raises(RequestError) as caught:
        parse(body(**fields), CompletionRequest)
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"\xff"])
def test_what_is_no_object_is_refused(data: bytes):
    with pytest.raises(RequestError, match="the body"):
        parse(data, CompletionRequest)


def test_unknown_fields_are_ignored():
    assert parse(body(prompt="a", something_new={"x": 1}, user="me"), CompletionRequest).prompt == "a"


def test_null_is_as_good_as_absent():
    request = parse(body(prompt="a", temperature=None, stop=None, n=None, logit_bias=None), CompletionRequest)
    params = request.sampling_params({}, max_tokens=16)
    assert (params.temperature, params.n, params.stops) == (1.0, 1, ())


def test_logit_bias_has_ids_as_text():
    request = parse(body(prompt="a", logit_bias={"7": -5}), CompletionRequest)
    assert request.sampling_params({}, max_tokens=1).logit_bias == {7: -5.0}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
    ],
)
def test_what_completions_do_not_serve_is_refused_by_name(fields: dict[str, Any], field: str):
    with pytest.raises(RequestError) as caught:
        parse(body(prompt="a", **fields), CompletionRequest).check()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
    ],
)
def test_what_chats_do_not_serve_is_refused_by_name(fields: dict[str, Any], field: str):
    request = parse(body(**{"messages": [{"role": "user", "content": "a"}], **fields}), ChatRequest)

    def check() -> None:
        request.check()
        shape_conversation(request.messages)

    with pytest.raises(RequestError) as caught:
        check()
    assert caught.value.field == field


def test_text_parts_stay_parts_for_the_template():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse(body(messages=[{"role": "user", "content": parts, "name": "me"}]), ChatRequest)
    assert shape_conversation(request.messages) == [{"role": "user", "content": parts, "name": "me"}]
