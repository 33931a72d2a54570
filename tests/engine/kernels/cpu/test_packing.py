"""Panels hold every number where the kernels look for it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.cpu import packing
from engine.kernels.cpu.packing import LANES, Concatenated, Interleaved, interleave, pack
from engine.kernels.quantization import GROUPS, quantize

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
