"""Masks over the vocabulary, against numpy, in Triton and in torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import token_masks as in_torch
from engine.kernels.triton.token_masks import exclude_tokens
from tests.engine.kernels.triton.masks_case import check_masks, random_words
from tests.engine.kernels.triton.numbers import DTYPES


@settings(settings.get_profile("triton"))
@given(
    rows=st.integers(1, 6),
    masks=st.integers(0, 6),
    vocabulary=st.sampled_from([1, 31, 32, 33, 1024, 1030, 2100]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_excluded_tokens_have_no_weight(rows: int, masks: int, vocabulary: int, dtype: torch.dtype, seed: int) -> None:
    for exclude in (exclude_tokens, in_torch.exclude_tokens):
        check_masks(exclude, rows, min(masks, rows), vocabulary, dtype, seed, "cpu")


def test_arguments_are_checked() -> None:
    logits, rows = torch.zeros(4, 64), torch.tensor([1], dtype=torch.int32)
    words = torch.from_numpy(random_words(np.random.default_rng(1), 2, 64))
    with pytest.raises(ValueError, match="must be contiguous"):
        exclude_tokens(logits.T, rows, words)
    with pytest.raises(ValueError, match="must be contiguous"):
        exclude_tokens(logits, rows, words.T)
