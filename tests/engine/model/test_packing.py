"""Panels hold every number where the kernels look for it; quantised ones are as near as their steps allow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model.packing import GROUPS, LANES, interleave, pack, quantise

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
    whole, scales = quantise(weight, kind)
    found = (whole.unflatten(1, (-1, GROUPS[kind])) * scales.float()[:, :, None]).flatten(1)
    largest = weight.unflatten(1, (-1, GROUPS[kind])).abs().amax(2).repeat_interleave(GROUPS[kind], 1)
    limit = {"int8": 127, "int4": 8}[kind]
    assert whole.abs().max() <= limit
    # Half a step; int4 may cut its largest number for the sake of the others.
    step = {"int8": 0.51 / 127, "int4": 0.36}[kind]
    assert ((found - weight).abs() <= step * largest * 1.01).all()


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from(sorted(GROUPS)))
def test_quantised_panels_hold_what_quantise_found(shape: tuple[int, int], kind: str) -> None:
    weight = torch.randn(shape)
    whole, scales = quantise(weight, kind)
    packed = pack(weight, kind)
    assert packed.scales is not None
    found_scales = packed.scales.transpose(1, 2).flatten(0, 1)[: shape[0]]
    assert torch.equal(found_scales, scales)
    words = packed.panels.transpose(1, 2).flatten(0, 1)[: shape[0]].contiguous()  # [outputs, words]
    numbers = words.view(torch.uint8).int()
    if kind == "int8":
        found = numbers - 128
    else:
        quads = numbers.view(len(words), -1, 4)
        found = torch.stack((quads & 15, quads >> 4), 2).flatten(1) - 8
    assert torch.equal(found.float(), whole)


@pytest.mark.parametrize("kind", sorted(GROUPS))
def test_a_weight_of_zeros_stays_zero(kind: str) -> None:
    whole, scales = quantise(torch.zeros(16, 64), kind)
    assert not (whole.unflatten(1, (-1, GROUPS[kind])) * scales.float()[:, :, None]).any()


def test_gate_and_up_take_turns() -> None:
    gate, up = torch.zeros(32, 8), torch.ones(32, 8)
    assert interleave(gate, up)[:, 0].tolist() == [0] * 16 + [1] * 16 + [0] * 16 + [1] * 16
