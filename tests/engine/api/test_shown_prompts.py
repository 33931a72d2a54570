"""Echoes with logprobs, and vLLM's prompt_logprobs: against a worker whose values are known."""

import json
from typing import Any

import pytest

from engine.api import shown_prompts
from tests.engine.api.conftest import VOCABULARY, InLoop, in_loop
from tests.engine.api.test_app import CHAT
from tests.engine.fake_executor import expected_tokens, logprob_of, top_tokens

PROMPT = "abcdefghij" * 6  # 60 tokens: chunks of a budget of 32, and blocks to be found again
KINDS: dict[str, dict[str, Any]] = {
    "v1": {},
    "inline": {"ablations": frozenset({"inline-frontend"})},
    "whole states": {"ablations": frozenset({"full-state"})},
    "drafts": {"draft_tokens": 3},
    "few blocks": {"num_blocks": 32, "max_model_len": 96},  # of 4 tokens: two such prompts fit, not their outputs
}


def piece(token: int) -> str:
    return chr(token) if token < 128 else f"<{token}>"


async def streamed(server: InLoop, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = await server.http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]


def merged(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The choices of a streamed completion, put together."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "logprobs": {}})
            one["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                one["logprobs"].setdefault(name, []).extend(values)
            one["finish_reason"] = choice["finish_reason"]
            one |= {name: choice[name] for name in ("prompt_logprobs",) if name in choice}
    return found


def check_echo(choice: dict[str, Any], prompt: str, output: list[int], top: int) -> None:
    """An echo's text and logprobs are those of the prompt, then those of the output."""
    tokens = [*prompt.encode(), *output]
    texts = [piece(token) for token in tokens]
    assert choice["text"] == "".join(texts)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == texts
    assert logprobs["text_offset"] == [len("".join(texts[:at])) for at in range(len(texts))]
    assert logprobs["token_logprobs"] == [None, *(logprob_of(token) for token in tokens[1:])]
    assert logprobs["top_logprobs"][0] is None
    for token, alternatives in zip(tokens[1:], logprobs["top_logprobs"][1:], strict=True):
        assert alternatives == {piece(one): logprob_of(one) for one in (token, *top_tokens(token, top))}


@pytest.mark.parametrize("kind", KINDS)
async def test_an_echo_has_the_logprobs_of_its_prompt(kind: str):
    output = expected_tokens(PROMPT.encode(), 5)
    async with in_loop(**KINDS[kind]) as server:
        body = {"prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 0}
        for _ in range(2):  # the second time the prompt is in the prefix cache, which has no logprobs
            answer = await server.post("/v1/completions", **body, max_tokens=5)
            check_echo(answer["choices"][0], PROMPT, output, 2)
            assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        events = await streamed(server, "/v1/completions", **body, max_tokens=5, n=3)
        choices = merged(events)
        assert sorted(choices) == [0, 1, 2]
        for choice in choices.values():
            check_echo(choice, PROMPT, output, 2)
        if kind == "few blocks":
            assert server.core.scheduler.counters.num_preemptions > 0


@pytest.mark.parametrize("kind", ["v1", "inline"])
async def test_an_echo_alone_generates_nothing_that_is_shown(kind: str):
    """As lm-eval asks for loglikelihoods, of several prompts at once."""
    async with in_loop(**KINDS[kind]) as server:
        body = {"prompt": [PROMPT, "xy"], "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 0, "seed": 1234}
        answer = await server.post("/v1/completions", **body)
        events = await streamed(server, "/v1/completions", **body, stream_options={"include_usage": True})
        for choices in (dict(enumerate(answer["choices"])), merged(events)):
            for index, prompt in enumerate((PROMPT, "xy")):
                check_echo(choices[index], prompt, [], 1)
                assert choices[index]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0
        assert events[-1]["usage"]["completion_tokens"] == 0
        assert answer["usage"]["prompt_tokens"] == len(PROMPT) + 2
        plain = await server.post("/v1/completions", prompt=PROMPT, echo=True, max_tokens=0)
        assert (plain["choices"][0]["text"], plain["choices"][0]["logprobs"]) == (PROMPT, None)
        error = await server.refusal("/v1/completions", {"prompt": "a", "max_tokens": 0})
        assert error["param"] == "max_tokens"


async def test_an_echo_of_token_ids_is_their_text():
    async with in_loop() as server:
        body = {"prompt": [[97, 98, 200, 99]], "echo": True, "logprobs": 0, "max_tokens": 0}
        [choice] = (await server.post("/v1/completions", **body))["choices"]
        assert choice["text"] == "ab<200>c"
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 7]
        assert choice["logprobs"]["top_logprobs"][1] == {"b": logprob_of(98)}


def expected_prompt_logprobs(tokens: list[int], top: int) -> list[Any]:
    found: list[Any] = [None]
    for token in tokens[1:]:
        each = {str(token): {"logprob": logprob_of(token), "rank": 2, "decoded_token": piece(token)}}
        for rank, other in enumerate(top_tokens(token, top), start=1):
            shown = {"logprob": logprob_of(other), "rank": rank, "decoded_token": piece(other)}
            each.setdefault(str(other), shown)
        found.append(each)
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_prompt_logprobs_have_vllms_form(kind: str):
    chat = "u:hello there;"
    messages = [{"role": "user", "content": "hello there"}]
    async with in_loop(**KINDS[kind]) as server:
        for top in (0, 3):
            asked = {"max_tokens": 2, "prompt_logprobs": top}
            for prompt in ("ab", PROMPT):
                expected = expected_prompt_logprobs(list(prompt.encode()), top)
                answer = await server.post("/v1/completions", prompt=prompt, n=2, **asked)
                assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [expected] * 2
                events = await streamed(server, "/v1/completions", prompt=prompt, n=2, **asked)
                assert [one["prompt_logprobs"] for one in merged(events).values()] == [expected] * 2
                assert sum("prompt_logprobs" in one for event in events for one in event["choices"]) == 2
            expected = expected_prompt_logprobs(list(chat.encode()), top)
            answer = await server.post("/v1/chat/completions", messages=messages, **asked)
            assert answer["prompt_logprobs"] == expected
            first, *rest = await streamed(server, "/v1/chat/completions", messages=messages, **asked)
            assert first["prompt_logprobs"] == expected
            assert not any("prompt_logprobs" in event for event in rest)
        plain = await server.post("/v1/completions", prompt="ab", max_tokens=2)
        assert "prompt_logprobs" not in plain["choices"][0]


@pytest.mark.parametrize("kind", ["v1", "inline"])
@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 5}, PROMPT[-5:]),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, PROMPT[:5]),
        ({"truncate_prompt_tokens": 60}, PROMPT),
        ({"truncate_prompt_tokens": 100}, PROMPT),
        ({"truncate_prompt_tokens": -1}, PROMPT),
        ({"truncate_prompt_tokens": -1, "prompt": "abc" * 50}, ("abc" * 50)[-(128 - 4) :]),
        ({"truncate_prompt_tokens": 3, "prompt": [*PROMPT.encode()]}, PROMPT[-3:]),
    ],
)
async def test_prompts_are_truncated_as_asked(kind: str, fields: dict[str, Any], kept: str):
    async with in_loop(**KINDS[kind]) as server:
        body = {"prompt": PROMPT, "max_tokens": 4, "echo": True, "return_token_ids": True, **fields}
        answer = await server.post("/v1/completions", **body)
        assert answer["usage"]["prompt_tokens"] == len(kept)
        assert answer["choices"][0]["token_ids"] == expected_tokens(kept.encode(), 4)
        assert answer["choices"][0]["text"].startswith(kept)
        assert [choice["text"] for choice in merged(await streamed(server, "/v1/completions", **body)).values()] == [
            answer["choices"][0]["text"]
        ]


async def test_long_answers_are_the_same_where_they_are_written_beside_the_loop(monkeypatch: pytest.MonkeyPatch):
    async with in_loop() as server:
        monkeypatch.setattr(shown_prompts, "LONG", 0)
        output = expected_tokens(PROMPT.encode(), 3)
        body = {"echo": True, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 3, "temperature": 0}
        [choice] = (await server.post("/v1/completions", prompt=PROMPT, **body))["choices"]
        check_echo(choice, PROMPT, output, 2)
        assert choice["prompt_logprobs"] == expected_prompt_logprobs(list(PROMPT.encode()), 1)
        answer = await server.post("/v1/chat/completions", messages=CHAT, prompt_logprobs=1)
        assert answer["prompt_logprobs"][0] is None


@pytest.mark.parametrize("kind", ["v1", "inline"])
async def test_token_ids_are_those_of_the_prompt_too(kind: str):
    """As vLLM's `return_token_ids`: in the first chunk of a stream only."""
    async with in_loop(**KINDS[kind]) as server:
        asked = {"max_tokens": 3, "return_token_ids": True}
        ids, chat = [97, 98, 99], list(b"u:hi;")
        body = {"prompt": "abc", "n": 2, **asked}
        answer = await server.post("/v1/completions", **body)
        assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [ids, ids]
        events = await streamed(server, "/v1/completions", **body)
        shown = [choice for event in events for choice in event["choices"] if "prompt_token_ids" in choice]
        assert sorted((choice["index"], choice["prompt_token_ids"]) for choice in shown) == [(0, ids), (1, ids)]
        assert (await server.post("/v1/chat/completions", messages=CHAT, **asked))["prompt_token_ids"] == chat
        first, *rest = await streamed(server, "/v1/chat/completions", messages=CHAT, **asked)
        assert first["prompt_token_ids"] == chat
        assert not any("prompt_token_ids" in event for event in rest)


async def test_chats_are_truncated_too(server: InLoop):
    asked = {"messages": CHAT, "max_tokens": 3, "return_token_ids": True}
    answer = await server.post("/v1/chat/completions", **asked, truncate_prompt_tokens=4)
    assert answer["usage"]["prompt_tokens"] == 4
    whole = await server.post("/v1/chat/completions", **asked)
    assert whole["usage"]["prompt_tokens"] > 4


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 128}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 128}, "max_tokens"),
        ({"truncate_prompt_tokens": 4, "truncation_side": "middle"}, "truncation_side"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [VOCABULARY]}, "allowed_token_ids"),
        ({"allowed_token_ids": [97], "bad_words": ["a"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 2}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["x"] * 1025}, "bad_words"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_what_cannot_hold_is_refused_by_its_field(server: InLoop, path: str, fields: dict[str, Any], field: str):
    asked = {"messages": CHAT} if "chat" in path else {"prompt": "ab"}
    error = await server.refusal(path, {**asked, **fields})
    assert error["param"] == field
    assert server.client.total_stats.live == 0
