"""Quantized numbers are as near as their steps allow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.quantization import GROUPS, quantize

sizes = st.tuples(st.integers(1, 50), st.integers(1, 4).map(lambda n: 64 * n))


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from(sorted(GROUPS)), st.integers(-20, 20))
def test_quantized_numbers_are_within_their_steps(shape: tuple[int, int], kind: str, exponent: int) -> None:
    weight = torch.randn(shape) * 2.0**exponent
    quantized = quantize(weight, kind)
    lowest, highest = {"int8": (-127, 127), "int4": (0, 15)}[kind]
    assert lowest <= quantized.integers.min() <= quantized.integers.max() <= highest
    largest = weight.unflatten(1, (-1, GROUPS[kind])).abs().amax(2).repeat_interleave(GROUPS[kind], 1)
    # Half a step, of which int4's can be as long as 2/15; it may cut its ends for the sake of the others.
    step = {"int8": 0.51 / 127, "int4": 0.3}[kind]
    assert ((quantized.dequantize() - weight).abs() <= step * largest * 1.01).all()


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(-20, 20))
def test_weights_that_have_sixteen_steps_stay_as_they_are(shape: tuple[int, int], exponent: int) -> None:
    """As those of a checkpoint that was quantized in the same groups before."""
    outputs, inputs = shape
    whole = torch.randint(0, 16, (outputs, inputs // 32, 32))
    whole[:, :, :2] = torch.tensor([0, 15])
    scale = torch.rand(outputs, inputs // 32, 1).add(0.5).bfloat16().float()
    weight = ((whole * scale - 8 * scale) * 2.0**exponent).flatten(1)
    found = quantize(weight, "int4")
    assert torch.equal(found.integers, whole.flatten(1).float())
    assert torch.allclose(found.dequantize(), weight, rtol=0, atol=float(weight.abs().max()) * 2**-7)


@pytest.mark.parametrize("kind", sorted(GROUPS))
def test_a_weight_of_zeros_stays_zero(kind: str) -> None:
    assert not quantize(torch.zeros(16, 64), kind).dequantize().any()


@pytest.mark.parametrize("kind", sorted(GROUPS))
def test_a_weight_that_is_quantized_in_pieces_is_the_same(kind: str) -> None:
    weight = torch.randn(37, 128)
    whole, pieces = quantize(weight, kind), quantize(weight, kind, elements=500)
    assert torch.equal(whole.dequantize(), pieces.dequantize())
