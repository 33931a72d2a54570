"""LLM on real random weights: prompts' logprobs, barred tokens and defaults, against plain transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from engine.api.app import create_app
from engine.api.state import ApiState
from redline import LLM, SamplingParams
from tests.engine.worker.driver import build_model

TOLERANCE = 5e-4
PROMPTS = ["a", "ab", "the same beginning, and then one end", "the same beginning, and then another", "x" * 70]
DEFAULTS = {"temperature": 0.0, "repetition_penalty": 1.3, "max_new_tokens": 9, "eos_token_id": 127}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    built = build_model("llama", folder, head_dim=16, intermediate_size=64)
    (folder / "generation_config.json").write_text(json.dumps(DEFAULTS))
    return folder, built


@pytest.fixture(scope="module")
def llm(model: tuple[Path, Any]) -> Iterator[LLM]:
    settings: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 24}
    with LLM(str(model[0]), dtype="float32", block_size=16, **settings) as running:
        yield running


def expected(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1)


def test_prompt_logprobs_are_those_of_transformers_also_where_prompts_are_cached(llm: LLM, model: tuple[Path, Any]):
    llm.generate(PROMPTS, SamplingParams(max_tokens=1, temperature=0))
    cached = llm.generate(PROMPTS[-1], SamplingParams(max_tokens=1, temperature=0))
    assert cached[0].num_cached_tokens > 0
    for answer in llm.generate(PROMPTS, SamplingParams(max_tokens=4, temperature=0, n=2, prompt_logprobs=3)):
        assert answer.num_cached_tokens == 0
        lines, scored = expected(model[1], answer.prompt_token_ids), answer.prompt_logprobs
        assert scored is not None
        assert len(scored) == len(answer.prompt_token_ids)
        assert scored[0] is None
        for at, found in enumerate(scored[1:], start=1):
            token, line = answer.prompt_token_ids[at], lines[at - 1]
            assert found is not None
            assert next(iter(found)) == token
            assert found[token].decoded_token == chr(token)
            assert found[token].rank == int((line > line[token]).sum()) + 1
            assert set(found) == {token, *torch.topk(line, 3).indices.tolist()}
            for other, shown in found.items():
                assert shown.logprob == pytest.approx(float(line[other]), abs=TOLERANCE)


def complete(llm: LLM, **body: Any) -> dict[str, Any]:
    """A completion over the HTTP application, around the same engine."""

    async def ask() -> dict[str, Any]:
        app = create_app(ApiState(llm._client, ("tiny",), sampling_defaults=llm._engine.generation.sampling))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            answer = await http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return llm._run(ask())


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihoods_are_those_of_transformers(max_tokens: int, llm: LLM, model: tuple[Path, Any]):
    """As lm-eval computes them: an echo of context and continuation, whose logprobs it adds up."""
    body = {"prompt": PROMPTS, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1234}
    for choice, prompt in zip(complete(llm, **body)["choices"], PROMPTS, strict=True):
        ids = [*prompt.encode()]
        logprobs, lines = choice["logprobs"], expected(model[1], ids)
        assert len(logprobs["tokens"]) == len(ids) + max_tokens
        assert "".join(logprobs["tokens"]) == choice["text"]
        end = len(ids)
        assert logprobs["tokens"][:end] == [*prompt]
        assert logprobs["text_offset"][:end] == list(range(end))
        assert logprobs["token_logprobs"][0] is None
        found = logprobs["token_logprobs"][1:end]
        assert found == pytest.approx([float(lines[at - 1, ids[at]]) for at in range(1, end)], abs=TOLERANCE)
        for at, top in enumerate(logprobs["top_logprobs"][1:end], start=1):
            best = chr(int(lines[at - 1].argmax()))
            assert max(top, key=top.__getitem__) == best
            assert top[prompt[at]] == logprobs["token_logprobs"][at]


def test_a_server_s_defaults_hold_where_a_request_says_nothing(llm: LLM):
    def text(**fields: Any) -> str:
        return complete(llm, prompt="hello", max_tokens=8, ignore_eos=True, **fields)["choices"][0]["text"]

    assert text() == text(temperature=0, repetition_penalty=1.3)
    assert text(repetition_penalty=1.0) == text(temperature=0, repetition_penalty=1.0) != text()
    chat_like = complete(llm, prompt="hello", ignore_eos=True)
    assert chat_like["usage"]["completion_tokens"] == 16, "completions have a default of their own"


def test_without_being_asked_for_there_are_none(llm: LLM):
    assert llm.generate("ab", SamplingParams(max_tokens=1))[0].prompt_logprobs is None


def test_bad_words_and_allowed_tokens_bar(llm: LLM):
    def tokens(**fields: Any) -> list[int]:
        params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, **fields)
        return llm.generate("hello", params)[0].outputs[0].token_ids

    free = tokens()
    pair = "".join(map(chr, free[2:4]))
    assert pair.strip() == pair
    barred = tokens(bad_words=[pair])
    assert barred[:3] == free[:3]
    assert barred[3] != free[3]
    letters = list(range(97, 123))
    assert set(tokens(allowed_token_ids=letters)) <= set(letters)
    assert not set(tokens(allowed_token_ids=letters, bad_words=["a", "b"])) & {97, 98}


def test_min_tokens_hold_for_stop_strings(llm: LLM):
    params: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "ignore_eos": True}
    whole = llm.generate("hello", SamplingParams(**params))[0].outputs[0]
    stop = chr(whole.token_ids[4])
    early = llm.generate("hello", SamplingParams(**params, stop=stop))[0].outputs[0]
    assert len(early.token_ids) <= 5
    later = llm.generate("hello", SamplingParams(**params, stop=stop, min_tokens=20))[0].outputs[0]
    behind = [at for at, token in enumerate(whole.token_ids) if chr(token) == stop and at >= 20]
    assert len(later.token_ids) == (behind[0] + 1 if behind else 30)
    assert later.stop_reason == (stop if behind else None)


def test_prompts_are_truncated(llm: LLM):
    [answer] = llm.generate("hello there", SamplingParams(max_tokens=2, truncate_prompt_tokens=5))
    assert answer.prompt_token_ids == [*b"there"]


def test_the_models_defaults_hold_where_no_params_are_given(llm: LLM):
    assert llm.default_sampling_params() == SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=9)
    assert llm.tokenizer.eos_ids == (127,)
    penalized = SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=9)
    assert llm.generate("hello")[0].outputs == llm.generate("hello", penalized)[0].outputs
    assert llm.generate("hello", SamplingParams(temperature=0.0))[0].outputs != llm.generate("hello")[0].outputs
