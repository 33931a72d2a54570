"""No field that changes the answer is dropped in silence; those that ask for nothing are accepted."""

import logging
from typing import Any

import pytest

from engine.api import unsupported_fields
from tests.engine.api.conftest import InLoop

CHAT = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 1},
}
BOTH = tuple(BODIES)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regex", "a+"),
        ("ebnf", "root ::= 'a'"),
        ("json_schema", {"type": "object"}),
        ("logits_processors", ["x"]),
        ("suffix", "end"),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("length_penalty", 0.5),
        ("max_new_tokens", 5),
        ("repeat_penalty", 1.1),
        ("do_sample", False),
        ("typical_p", 0.5),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("prompt_embeds", "AAAA"),
        ("kv_transfer_params", {"do_remote_decode": True}),
        ("thinking", {"type": "enabled"}),
        ("enable_thinking", False),
        ("verbosity", "low"),
        ("media_io_kwargs", {"video": {"num_frames": 4}}),
        ("watermarking", True),
        ("ec_transfer_params", {"a": 1}),
        ("temprature", 0.5),
        ("max_token", 5),
        ("stops", ["a"]),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(server: InLoop, field: str, value: Any):
    for path, body in BODIES.items():
        error = await server.refusal(path, body | {field: value})
        assert error["param"] == field
        assert field in error["message"]
    assert not server.core.has_work


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"},
        {"prompt_cache_key": "x", "parallel_tool_calls": True, "request_id": "r", "prediction": {"type": "content"}},
        {
            "guided_json": None,
            "guided_regex": "",
            "guided_choice": [],
            "structured_outputs": {},
            "logits_processors": [],
        },
        {"suffix": "", "best_of": 1, "audio": None, "modalities": ["text"], "use_beam_search": False},
        {"length_penalty": 1.0, "early_stopping": False, "do_sample": True, "num_beams": 1, "repeat_penalty": 1},
        {"response_format": {"type": "text"}, "functions": [], "function_call": "none", "tool_choice": "none"},
        {"verbosity": "medium", "include_reasoning": True, "mm_processor_kwargs": None, "kv_transfer_params": {}},
        {"session_id": "s", "stream_interval": 4, "return_mm_kwargs": False, "routed_experts_prompt_start": 1},
        {"logprobs": False, "top_logprobs": 0, "tools": [], "bad_words": [], "echo": False},
    ],
)
async def test_what_asks_for_nothing_is_accepted(
    server: InLoop, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
):
    for path, body in BODIES.items():
        plain = await server.post(path, **body)
        given = await server.post(path, **body, **fields)
        assert given["choices"] == plain["choices"]
    assert not caplog.records


async def test_an_unknown_field_is_logged_once(
    server: InLoop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(unsupported_fields, "_seen", set())
    for path in (*BOTH, *BOTH):
        await server.post(path, **BODIES[path], zzz_vendor_hint={"a": 1})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "zzz_vendor_hint" in record.getMessage()
    for number in range(2 * unsupported_fields.MAX_NAMES):
        await server.post("/tokenize", prompt="a", **{f"invented_{number}\n": 1})
    assert len(caplog.records) == unsupported_fields.MAX_NAMES
    assert not any("\n" in record.getMessage() for record in caplog.records)


NEUTRAL: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "n": 1, "best_of": 1, "temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "stop": [], "stop_token_ids": [],
        "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_tokens": 0,
        "ignore_eos": False, "stream": False, "stream_options": {}, "suffix": "", "logprobs": False, "echo": False,
        "model": "", "user": "", "cache_salt": "", "priority": 0, "return_token_ids": False,
    },
    "/v1/chat/completions": {
        "n": 1, "temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0.0, "stop": [], "logit_bias": {}, "min_tokens": 0,
        "logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none", "model": "", "stream_options": {},
        "response_format": {"type": "text"}, "chat_template_kwargs": {}, "add_generation_prompt": True, "priority": 0,
        "max_completion_tokens": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("path", BOTH)
async def test_neutral_values_and_null_are_as_good_as_absent(server: InLoop, path: str):
    plain = (await server.post(path, **BODIES[path]))["choices"]
    for field, value in NEUTRAL[path].items():
        for one in (value, None):
            assert (await server.post(path, **BODIES[path] | {field: one}))["choices"] == plain, (field, one)
    assert (await server.post(path, **BODIES[path], **NEUTRAL[path]))["choices"] == plain
    assert (await server.post(path, **BODIES[path], **dict.fromkeys(NEUTRAL[path])))["choices"] == plain


@pytest.mark.parametrize(
    ("field", "forms"),
    [
        ("max_tokens", [4, 4.0, "4"]),
        ("min_tokens", [2, 2.0]),
        ("n", [2, 2.0]),
        ("seed", [7, 7.0]),
        ("top_k", [5, 5.0]),
        ("logprobs", [1, 1.0, True]),
        ("echo", [True, 1, "true"]),
        ("prompt", [[1, 2], [1.0, 2.0], [[1, 2]]]),
        ("stop_token_ids", [[5], [5.0]]),
        ("temperature", [0, 0.0, "0"]),
    ],
)
async def test_numbers_in_other_forms(server: InLoop, field: str, forms: list[Any]):
    body = BODIES["/v1/completions"] | {"max_tokens": 5, "return_token_ids": True}
    answers = [(await server.post("/v1/completions", **body | {field: form}))["choices"] for form in forms]
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("value", [4.5, 1e30, "four", [4], {}])
async def test_what_is_no_whole_number_is_refused(server: InLoop, value: Any):
    error = await server.refusal("/v1/completions", {"prompt": "a", "max_tokens": value})
    assert error["param"] == "max_tokens"
