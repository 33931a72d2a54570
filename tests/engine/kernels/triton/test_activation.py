"""Gated activations against float64, in each storage dtype."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.triton.activation import silu_mul
from tests.engine.kernels.triton.elementwise_case import GATED, check_gated
from tests.engine.kernels.triton.numbers import DTYPES


@settings(settings.get_profile("triton"))
@given(
    kernel=st.sampled_from(list(GATED)),
    tokens=st.integers(0, 140),
    n=st.one_of(st.integers(1, 70), st.sampled_from([1024, 1100])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_the_activated_gate_is_multiplied(
    kernel: Callable[[Tensor, Tensor], None], tokens: int, n: int, dtype: torch.dtype, seed: int
) -> None:
    check_gated(kernel, tokens, n, dtype, seed)


@pytest.mark.parametrize("kernel", list(GATED))
def test_large_gates_do_not_overflow(kernel: Callable[[Tensor, Tensor], None]) -> None:
    gate = torch.tensor([[-3e4, -200.0, -90.0, 0.0, 90.0, 3e4]])
    out = torch.empty(1, 6)
    kernel(torch.cat((gate, torch.ones(1, 6)), 1), out)
    torch.testing.assert_close(out, gate.clamp(min=0), rtol=0, atol=1e-30)


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"not \(2, 8\)"):
        silu_mul(torch.ones(2, 6), torch.ones(2, 4))
