"""Requests to simulated hardware that ask for what only a model computes are refused by field."""

from typing import Any

import msgspec
import pytest

from engine.errors import RequestError
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.simulated import REFUSED, check_simulated, refused_grammar, with_stop_ids
from engine.messages import AddRequest, Ready, Sampling

REAL = Ready("model", "cpu", "bfloat16", 100, 64, 4, 64, 16, 10, True)
SIMULATED = msgspec.structs.replace(REAL, simulated="NVIDIA H100")
VALUES: dict[str, Any] = {
    "logprobs": 0, "prompt_logprobs": 1, "logit_bias": {3: 5.0}, "allowed_token_ids": [1], "bad_words": ["no"],
    "thinking_token_budget": 5,
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_fields(field: str) -> None:
    params = SamplingParams(**{field: VALUES[field]})
    check_simulated(REAL, params)
    with pytest.raises(
        RequestError, match=rf"^{field} is not possible on simulated hardware \(NVIDIA H100\)"
    ) as raised:
        check_simulated(SIMULATED, params)
    assert raised.value.field == field


def test_fields_without_effect_on_times_are_accepted() -> None:
    check_simulated(SIMULATED, SamplingParams(temperature=0.7, top_p=0.9, top_k=5, min_tokens=3, presence_penalty=1.0))


def test_stop_ids_are_known_to_the_executor() -> None:
    message = with_stop_ids(AddRequest(1, b"", 5, Sampling(seed=3), stop_ids=(7, 8)))
    assert (message.sampling.stop_ids, message.sampling.seed) == ((7, 8), 3)
    assert not message.sampling.adjusts_logits


def test_grammars() -> None:
    assert refused_grammar(REAL) == ""
    assert "structured output" in refused_grammar(SIMULATED)
