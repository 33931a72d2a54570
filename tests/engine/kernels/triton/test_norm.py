"""RMSNorm against float64, in each storage dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.triton.norm import rms_norm
from tests.engine.kernels.triton.elementwise_case import EPSILON, check_norm, normalized
from tests.engine.kernels.triton.numbers import DTYPES, TOLERANCE, random_numbers


@settings(settings.get_profile("triton"))
@given(
    tokens=st.integers(0, 150),
    hidden=st.one_of(st.integers(1, 90), st.sampled_from([128, 257, 576])),
    has_delta=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_the_sum_is_normalized(
    tokens: int, hidden: int, has_delta: bool, offset: float, dtype: torch.dtype, seed: int
) -> None:
    check_norm(tokens, hidden, has_delta, offset, dtype, seed)


def test_a_token_does_not_depend_on_others() -> None:
    residual, delta = random_numbers(130, 48, seed=1), random_numbers(130, 48, seed=2)
    together, alone = torch.empty(130, 48), torch.empty(1, 48)
    one = residual[77:78].clone()
    residual[3] = torch.nan
    rms_norm(residual, delta, torch.ones(48), together, EPSILON)
    rms_norm(one, delta[77:78], torch.ones(48), alone, EPSILON)
    assert torch.equal(together[77], alone[0])


def test_the_residual_may_have_another_dtype() -> None:
    residual, delta = random_numbers(5, 32, seed=3).half(), random_numbers(5, 32, seed=4).half()
    total, out = residual.float() + delta.float(), torch.empty(5, 32)
    rms_norm(residual, delta, torch.ones(32), out, EPSILON)
    assert torch.equal(residual, total.half())
    torch.testing.assert_close(out.double(), normalized(total, torch.ones(32), 0.0), **TOLERANCE[torch.float32])


def test_arguments_must_be_on_one_device() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="different devices"):
        rms_norm(x, None, torch.ones(4, device="meta"), x.clone(), EPSILON)
