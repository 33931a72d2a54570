"""Logprobs, top tokens and ranks against log_softmax in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.triton.logprobs import RUN, LogprobsWorkspace, token_logprobs
from tests.engine.kernels.triton.logprobs_case import check_logprobs, compute
from tests.engine.kernels.triton.numbers import DTYPES, random_numbers


@settings(settings.get_profile("triton"))
@given(
    count=st.integers(1, 6),
    vocab=st.sampled_from([5, 600, RUN, 2 * RUN + 5]),
    top=st.sampled_from([0, 1, 5]),
    levels=st.sampled_from([3, 10**6]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_logprobs_are_those_of_the_logits(
    count: int, vocab: int, top: int, levels: int, dtype: torch.dtype, seed: int
) -> None:
    check_logprobs(count, vocab, top, levels, dtype, seed)


def test_all_tokens_can_be_asked_for() -> None:
    logits = random_numbers(1, 9, seed=3)
    logits[0, [2, 5]] = -math.inf
    ids, values, _ = compute(logits, np.zeros(1, np.int32), torch.tensor([5], dtype=torch.int32), 9)
    assert sorted(ids[0, 1:].tolist()) == list(range(9))
    assert ids[0, -2:].tolist() == [2, 5]
    assert values[0, 0] == -math.inf


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_have_nan_and_valid_tokens(number: float) -> None:
    logits = torch.full((1, 1500), number)
    logits[0, 7] = number if number < 0 else 1.0
    ids, values, ranks = compute(logits, np.zeros(1, np.int32), torch.tensor([7], dtype=torch.int32), 3)
    assert ((ids >= 0) & (ids < 1500)).all()
    assert len(set(ids[0, 1:].tolist())) == 3
    assert torch.isnan(values).all() == torch.isnan(torch.log_softmax(logits, -1)[0, ids[0].long()]).all()
    assert ranks.tolist() == [1]


def test_shapes_must_fit() -> None:
    logits, rows = torch.zeros(2, 50), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="at most 51 columns"):
        compute(logits, rows, torch.zeros(2, dtype=torch.int32), 51)
    with pytest.raises(ValueError, match="not for 2 rows of 1 runs"):
        token_logprobs(
            logits,
            torch.from_numpy(rows),
            torch.zeros(2, dtype=torch.int32),
            (torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32)),
            LogprobsWorkspace.allocate(1, 50, "cpu"),
        )
