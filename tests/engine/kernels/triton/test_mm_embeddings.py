"""Embeddings of encoders replace the hidden states of their placeholders and of nothing else."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.triton.mm_embeddings import merge_embeddings
from tests.engine.kernels.triton.numbers import DTYPES, poisoned, random_numbers


@settings(settings.get_profile("triton"))
@given(
    tokens=st.integers(0, 150),
    hidden=st.sampled_from([1, 24, 130, 2050]),
    rows=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_placeholders_are_replaced(tokens: int, hidden: int, rows: int, dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = rng.integers(-1, rows, tokens).astype(np.int32)
    memory = poisoned(tokens + 2, hidden, dtype=dtype)
    memory[:tokens] = random_numbers(tokens, hidden, seed=seed).to(dtype)
    expected = memory.clone()
    cache = poisoned(rows + 1, hidden + 8, dtype=dtype)  # unread rows and columns hold garbage
    used = sources[sources >= 0]
    cache[used, :hidden] = random_numbers(rows + 1, hidden, seed=seed + 1)[used].to(dtype)
    expected[np.flatnonzero(sources >= 0)] = cache[used, :hidden]
    merge_embeddings(memory[:tokens], cache[:, :hidden], torch.from_numpy(sources))
    torch.testing.assert_close(memory, expected, rtol=0, atol=0, equal_nan=True)
