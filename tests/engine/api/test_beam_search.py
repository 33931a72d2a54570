"""Beam search over the API; the fake worker says which tokens are the most likely after each prefix."""

import asyncio
from typing import Any

import pytest

from engine.frontend.beam_search import WIDEST
from engine.frontend.sampling_params import SamplingParams
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.fake_executor import expected_tokens, logprob_of, top_tokens

PATH = "/v1/completions"
Found = list[tuple[tuple[int, ...], float, bool]]  # tokens, the sum of their logprobs, and whether the last one ends it


def search(prompt: bytes, width: int, steps: int, penalty: float = 1.0, end: int | None = None) -> Found:
    beams: Found = [((), 0.0, False)]
    ended: Found = []
    for _ in range(steps):
        grown: Found = []
        for ids, total, _ in beams:
            [token] = expected_tokens([*prompt, *ids], 1)
            grown += [((*ids, one), total + logprob_of(one), one == end) for one in top_tokens(token, 2 * width)]
        ended += [beam for beam in grown if beam[2]]
        beams = sorted((beam for beam in grown if not beam[2]), key=lambda beam: -beam[1])[:width]
    return sorted([*ended, *beams], key=lambda beam: -beam[1] / len(beam[0]) ** penalty)[:width]


@pytest.mark.parametrize("width", [1, 2, 3, WIDEST])
async def test_the_beams_are_the_most_likely_outputs(server: InLoop, width: int):
    body = {"use_beam_search": True, "n": width, "max_tokens": 4, "return_token_ids": True, "logprobs": 1}
    answer = await server.post(PATH, prompt=["ab", "xyz"], **body)
    wanted = [beam for prompt in (b"ab", b"xyz") for beam in search(prompt, width, 4)]
    assert [tuple(one["token_ids"]) for one in answer["choices"]] == [ids for ids, *_ in wanted]
    sums = [sum(one["logprobs"]["token_logprobs"]) for one in answer["choices"]]
    assert sums == [total for _, total, _ in wanted]
    assert {one["finish_reason"] for one in answer["choices"]} == {"length"}
    assert [one["index"] for one in answer["choices"]] == list(range(2 * width))
    assert answer["usage"]["completion_tokens"] == 2 * width * 4
    assert answer["usage"]["prompt_tokens"] == 5
    assert server.client.total_stats.live == 0


@pytest.mark.parametrize("penalty", [0.0, 1.0, 3.0])
async def test_beams_that_end_compete_by_their_length(server: InLoop, penalty: float):
    plain = search(b"ab", 3, 5)
    end = plain[0][0][2]
    wanted = search(b"ab", 3, 5, penalty, end)
    server.client.tokenizer.eos_ids = (end,)
    body = {"use_beam_search": True, "n": 3, "max_tokens": 5, "return_token_ids": True, "length_penalty": penalty}
    answer = await server.post(PATH, prompt="ab", **body)
    found = [(tuple(one["token_ids"]), one["finish_reason"] == "stop") for one in answer["choices"]]
    assert found == [(ids, ended) for ids, _, ended in wanted]
    ignoring = await server.post(PATH, prompt="ab", ignore_eos=True, **body)
    assert {one["finish_reason"] for one in ignoring["choices"]} == {"length"}


async def test_chats_have_beams(server: InLoop):
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "use_beam_search": True, "n": 2, "max_tokens": 3, "return_token_ids": True}
    answer = await server.post("/v1/chat/completions", **body)
    assert [tuple(one["token_ids"]) for one in answer["choices"]] == [ids for ids, *_ in search(b"u:hi;", 2, 3)]
    text = bytes(answer["choices"][0]["token_ids"]).decode("utf-8", "replace")
    assert answer["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "use_beam_search"),
        ({"n": WIDEST + 1}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"stop": "a"}, "stop"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"guided_choice": ["a", "b"]}, "guided_choice"),
        ({"prompt": [400]}, "prompt"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
        ({"priority": 3}, "priority"),
    ],
)
async def test_what_excludes_beams_is_refused(server: InLoop, fields: dict[str, Any], param: str):
    error = await server.refusal(PATH, {"prompt": "a", "use_beam_search": True, "max_tokens": 4} | fields)
    assert error["param"] == param
    assert not server.core.has_work


async def test_a_client_that_leaves_ends_the_search():
    async with in_loop(max_model_len=2048) as server:
        body = {"prompt": "ab", "use_beam_search": True, "n": 2, "max_tokens": 2000}
        asking = asyncio.ensure_future(server.http.post(PATH, json=body))
        while not server.core.has_work:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not server.core.has_work
        assert server.client.total_stats.live == 0


async def test_it_needs_the_api(server: InLoop):
    with pytest.raises(Exception, match="a field of the HTTP API only"):
        server.client.add_request([[1, 2]], SamplingParams(use_beam_search=True))
