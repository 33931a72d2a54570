"""Gated activations against float64, in each storage dtype."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.triton.activation import gelu_tanh_mul, silu_mul
from tests.engine.kernels.triton.numbers import DTYPES, TOLERANCE, poisoned, random_numbers

KERNELS = {
    silu_mul: torch.nn.functional.silu,
    gelu_tanh_mul: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@settings(settings.get_profile("triton"))
@given(
    kernel=st.sampled_from(list(KERNELS)),
    tokens=st.integers(0, 140),
    n=st.one_of(st.integers(1, 70), st.sampled_from([1024, 1100])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_the_activated_gate_is_multiplied(
    kernel: Callable[[Tensor, Tensor], None], tokens: int, n: int, dtype: torch.dtype, seed: int
) -> None:
    gate_up = random_numbers(tokens, 2 * n, seed=seed, scale=4).to(dtype)
    memory = poisoned(tokens + 2, n, dtype=dtype)
    kernel(gate_up, memory[:tokens])
    gate, up = gate_up.double().chunk(2, 1)
    tolerance = TOLERANCE[dtype] | {"atol": 1e-5}
    torch.testing.assert_close(memory[:tokens].double(), KERNELS[kernel](gate) * up, **tolerance)
    assert memory[tokens:].isnan().all()


@pytest.mark.parametrize("kernel", list(KERNELS))
def test_large_gates_do_not_overflow(kernel: Callable[[Tensor, Tensor], None]) -> None:
    gate = torch.tensor([[-3e4, -200.0, -90.0, 0.0, 90.0, 3e4]])
    out = torch.empty(1, 6)
    kernel(torch.cat((gate, torch.ones(1, 6)), 1), out)
    torch.testing.assert_close(out, gate.clamp(min=0), rtol=0, atol=1e-30)


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"not \(2, 8\)"):
        silu_mul(torch.ones(2, 6), torch.ones(2, 4))
