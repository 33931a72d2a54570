"""Products in fp8: quantized activations against torch's cast, products against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.triton import fp8
from tests.engine.kernels.triton.numbers import DTYPES, poisoned, random_numbers

E4M3 = torch.float8_e4m3fn


@settings(settings.get_profile("triton"))
@given(
    rows=st.integers(0, 6),
    inputs=st.sampled_from([1, 70, 300]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
)
def test_rows_are_rounded_to_the_nearest(rows: int, inputs: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    x = poisoned(rows, inputs + 3, dtype=dtype)
    x[:, :inputs] = (random_numbers(rows, inputs, seed=seed).pow(3) * scale).to(dtype)  # some far below the largest
    values, scales = torch.zeros(rows + 1, inputs, dtype=E4M3), poisoned(rows + 1)
    fp8.quantize_rows(x[:, :inputs], values[:rows], scales[:rows])
    expected = x[:, :inputs].float() / scales[:rows, None]
    assert (values[:rows].float() == expected.clamp(-fp8.LARGEST, fp8.LARGEST).to(E4M3).float()).all()
    assert (expected.abs().amax(1) <= fp8.LARGEST * (1 + 1e-6)).all()
    assert scales[rows:].isnan().all()


def test_rows_of_zeros_stay_zeros() -> None:
    values, scales = torch.ones(2, 40).to(E4M3), poisoned(2)
    fp8.quantize_rows(torch.zeros(2, 40), values, scales)
    assert (values.float() == 0).all()
    assert scales.tolist() == [1.0, 1.0]


def scales_each_row() -> bool:
    """Whether this torch computes products of the CPU with a scale for each row; those of GPUs always have it."""
    values, scales = torch.ones(16, 16).to(E4M3), torch.ones(16, 1)
    try:
        torch._scaled_mm(values, values.T, scales, scales.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not scales_each_row(), reason="this torch has one scale for a whole product on the CPU")
@pytest.mark.parametrize("rows", [1, 5])
def test_products_are_those_of_the_quantized_numbers(rows: int) -> None:
    x, weight = random_numbers(rows, 64, seed=1).bfloat16(), fp8.quantize_fp8(random_numbers(32, 64, seed=2))
    values, scales = torch.empty(rows, 64, dtype=E4M3), torch.empty(rows)
    found = fp8.fp8_linear(x, weight, values, scales)
    expected = fp8.reference(values, scales, weight)
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=1e-2)
    exact = x.double() @ (weight.values.double() * weight.scales.double()[:, None]).T
    torch.testing.assert_close(expected.double(), exact, rtol=0.1, atol=1.0)


def test_a_weight_is_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "ELEMENTS", 200)  # three outputs at a time
    weight = random_numbers(8, 64, seed=3)
    weight[1] = 0
    packed = fp8.quantize_fp8(weight)
    found = packed.values.float() * packed.scales[:, None]
    torch.testing.assert_close(found, weight, rtol=2**-4, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "why"),
    [((32, 64), None), ((30, 64), "multiples of 16, not 64 and 30"), ((32, 40), "multiples of 16, not 40 and 32")],
)
def test_which_shapes_are_refused(shape: tuple[int, int], why: str | None) -> None:
    found = fp8.refusal(*shape)
    assert found is None if why is None else found is not None and why in found
