"""Embeddings of encoders replace the hidden states of their placeholders and of nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.kernels.triton.elementwise_case import check_embeddings
from tests.engine.kernels.triton.numbers import DTYPES


@settings(settings.get_profile("triton"))
@given(
    tokens=st.integers(0, 150),
    hidden=st.sampled_from([1, 24, 130, 2050]),
    rows=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_placeholders_are_replaced(tokens: int, hidden: int, rows: int, dtype: torch.dtype, seed: int) -> None:
    check_embeddings(tokens, hidden, rows, dtype, seed)
