"""Panels hold every number where the kernels look for it; quantised ones are as near as their steps allow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.cpu import packing
from engine.kernels.cpu.packing import GROUPS, LANES, Concatenated, Interleaved, interleave, pack, quantize

sizes = st.tuples(st.integers(1, 50), st.integers(1, 4).map(lambda n: 64 * n))


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from(["float32", "bfloat16"]))
def test_plain_panels_hold_each_number(shape: tuple[int, int], kind: str) -> None:
    dtype = getattr(torch, kind)
    weight = torch.randn(shape).to(dtype)
    panels = pack(weight, kind).panels.view(dtype).unflatten(2, (LANES, -1))  # [panels, units, 16, numbers of a unit]
    columns = panels.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    assert torch.equal(columns[: shape[0]], weight)
    assert not columns[shape[0] :].any()


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from(sorted(GROUPS)), st.integers(-20, 20))
def test_quantised_numbers_are_within_their_steps(shape: tuple[int, int], kind: str, exponent: int) -> None:
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


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from(sorted(GROUPS)))
def test_quantised_panels_hold_what_quantise_found(shape: tuple[int, int], kind: str) -> None:
    weight = torch.randn(shape)
    quantized = quantize(weight, kind)
    packed = pack(weight, kind)
    assert packed.scales is not None
    found_scales = packed.scales.transpose(1, 2).flatten(0, 1)[: shape[0]]
    if quantized.minimums is None:
        assert torch.equal(found_scales, quantized.scales)
    else:
        assert torch.equal(found_scales[:, 0::2], quantized.scales)
        assert torch.equal(found_scales[:, 1::2], quantized.minimums)
    words = packed.panels.transpose(1, 2).flatten(0, 1)[: shape[0]].contiguous()  # [outputs, words]
    numbers = words.view(torch.uint8).int()
    if kind == "int8":
        found = numbers - 128
    else:
        quads = numbers.view(len(words), -1, 4)
        found = torch.stack((quads & 15, quads >> 4), 2).flatten(1)
    assert torch.equal(found.float(), quantized.integers)


@pytest.mark.parametrize("kind", sorted(GROUPS))
def test_a_weight_of_zeros_stays_zero(kind: str) -> None:
    assert not quantize(torch.zeros(16, 64), kind).dequantize().any()


def test_gate_and_up_take_turns() -> None:
    gate, up = torch.zeros(32, 8), torch.ones(32, 8)
    assert interleave(gate, up)[:, 0].tolist() == [0] * 16 + [1] * 16 + [0] * 16 + [1] * 16


@pytest.mark.parametrize("kind", ["float32", "bfloat16", *sorted(GROUPS)])
@pytest.mark.parametrize("lengths", [(96, 16, 16), (70,), (33, 80, 7)])
def test_weights_in_bands_are_packed_as_one(
    lengths: tuple[int, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [torch.randn(length, 128) for length in lengths]
    gate, up = torch.randn(2, 80, 128)
    wholes = [torch.cat(parts), interleave(gate, up)]
    wanted = [pack(whole, kind) for whole in wholes]
    monkeypatch.setattr(packing, "BAND_ELEMENTS", 32 * 128)
    for weight, whole, one in zip([Concatenated(parts), Interleaved(gate, up)], wholes, wanted, strict=True):
        found = pack(weight, kind)
        assert tuple(weight.shape) == tuple(whole.shape)
        assert torch.equal(found.panels, one.panels)
        assert (found.scales is None) == (one.scales is None)
        assert found.scales is None or one.scales is None or torch.equal(found.scales, one.scales)
