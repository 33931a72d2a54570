from typing import Any

import pytest

from engine.columns import int32s
from engine.errors import RequestError
from engine.frontend.sampling_params import SamplingParams, make_request
from engine.frontend.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1000),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("min_p", -1),
        ("top_k", -2),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("logprobs", 21),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("stop", [""]),
        ("stop", ["x"] * 65),
        ("logit_bias", {1: 101}),
    ],
)
def test_what_cannot_hold_is_refused_by_name(field: str, value: Any):
    with pytest.raises(RequestError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("fields", [{"stop_token_ids": [300]}, {"logit_bias": {-1: 1.0}}])
def test_ids_outside_the_vocabulary_are_refused(fields: dict[str, Any]):
    with pytest.raises(RequestError, match=next(iter(fields))):
        SamplingParams(**fields).check_vocabulary(300)


def test_a_request_says_what_the_core_and_the_worker_must_know(stand_in: Tokenizer):
    params = SamplingParams(temperature=0, top_k=-1, max_tokens=50, min_tokens=3, stop_token_ids=[5], logprobs=2)
    request = make_request(1, [4, 5, 6], params, stand_in, seed=-1, tokens_left=20)
    assert int32s(request.prompt).tolist() == [4, 5, 6]
    assert request.max_tokens == 20, "no more than fits behind the prompt"
    assert request.stop_ids == (2, 5)
    assert request.sampling.stop_ids == (2, 5), "the worker masks them for min_tokens"
    assert (request.sampling.top_k, request.sampling.logprobs) == (0, 2)
    assert request.sampling.seed == 2**64 - 1


def test_ignore_eos_leaves_the_user_s_stops(stand_in: Tokenizer):
    request = make_request(1, [4], SamplingParams(ignore_eos=True, stop_token_ids=[5]), stand_in, 0, 20)
    assert request.stop_ids == (5,)
    assert request.sampling.stop_ids == ()


def test_without_max_tokens_an_output_goes_on_as_long_as_it_fits(stand_in: Tokenizer):
    assert make_request(1, [4], SamplingParams(max_tokens=None), stand_in, 0, 77).max_tokens == 77
