"""Norms of heads, rotation and the write into the cache, against float64 torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.kv_storage import EIGHT_BITS
from engine.kernels.triton.rotary import rotate_and_cache, write_cache
from tests.engine.kernels.triton.rotary_case import TOLERANCE, Case, Setup, check_cache, empty_cache, run_and_check


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([4, 12, 16, 80]))
    rotary_dim = 2 * draw(st.integers(0, head_dim // 2))
    pairs, sections = rotary_dim // 2, None
    if pairs >= 3 and draw(st.booleans()):
        side = draw(st.integers(1, pairs // 3))
        sections = (pairs - 2 * side, side, side)
    return Case(
        tokens=draw(st.integers(1, 12)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        interleaved=draw(st.booleans()),
        sections=sections,
        interleaved_sections=draw(st.booleans()),
        norms=draw(st.booleans()),
        block_size=draw(st.sampled_from([1, 4, 16])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        cache_dtype=draw(st.sampled_from([None, None, *EIGHT_BITS])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(settings.get_profile("triton"))
@given(cases())
def test_equals_torch(case: Case) -> None:
    run_and_check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(rotary_dim=8, norms=True),
        Case(rotary_dim=12, interleaved=True),
        Case(rotary_dim=0, norms=True),
        Case(rotary_dim=16, sections=(2, 3, 3)),
        Case(rotary_dim=16, sections=(4, 2, 2), interleaved_sections=True),
        Case(cache_dtype=torch.int8),
        Case(cache_dtype=torch.float8_e4m3fn),
        Case(cache_dtype=torch.uint8, norms=True, rotary_dim=6),
        Case(dtype=torch.bfloat16),
        Case(dtype=torch.float16, tokens=40, head_dim=80, rotary_dim=40),
    ],
)
def test_each_kind(case: Case) -> None:
    run_and_check(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("cache_dtype", [None, *EIGHT_BITS])
def test_head_dims(head_dim: int, cache_dtype: torch.dtype | None) -> None:
    half = head_dim // 2
    sections = (half - 2 * (half // 3), half // 3, half // 3)
    more = {"head_dim": head_dim, "rotary_dim": head_dim, "cache_dtype": cache_dtype, "norms": True}
    for case in (Case(**more), Case(**more, sections=sections), Case(**more, dtype=torch.bfloat16)):
        run_and_check(case)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, *EIGHT_BITS])
def test_keys_and_values_without_rotation(cache_dtype: torch.dtype) -> None:
    """They may be views whose heads and tokens lie in any order."""
    setup = Setup(Case(tokens=9, kv_heads=3, heads=3, cache_dtype=cache_dtype))
    keys = torch.randn(3, 9, 16).transpose(0, 1)
    values = torch.randn(9, 6, 16)[:, ::2]
    write_cache(keys, values, setup.index, setup.cache, setup.shape)
    check_cache(
        setup.cache, setup.index, keys.double(), values.double(), 1e-2 if cache_dtype == torch.bfloat16 else 1e-6
    )


@pytest.mark.parametrize("cache_dtype", list(EIGHT_BITS))
def test_a_head_of_zeros_is_stored_as_zeros(cache_dtype: torch.dtype) -> None:
    setup = Setup(Case(tokens=2, cache_dtype=cache_dtype))
    zeros = torch.zeros(2, 2, 16)
    write_cache(zeros, zeros, torch.tensor([4, 5], dtype=torch.int32), setup.cache, setup.shape)
    assert (setup.cache.keys[1, :, :2].view(torch.uint8) == 0).all()
    assert (setup.cache.key_scales[1, :, :2] == 0).all()


def test_numbers_of_e4m3_are_rounded_to_the_nearest_even() -> None:
    """Numbers between two neighbors, also subnormal ones, are rounded as by torch. 448 in front: the scale is 1."""
    bits = torch.arange(0, 127, dtype=torch.uint8)
    exact = bits.view(torch.float8_e4m3fn).float()
    middles = (exact[:-1] + exact[1:]) / 2
    numbers = torch.cat((exact, middles, middles * 1.001, middles * 0.999, -exact, -middles))
    lines = torch.cat((torch.full((len(numbers), 1), 448.0), numbers[:, None]), 1)[:, None]
    shape = AttentionShape(1, 1, 2, 4)
    for dtype in (torch.float8_e4m3fn, torch.uint8):
        cache = empty_cache(len(lines) // 4 + 1, shape, dtype)
        write_cache(lines, lines, torch.arange(len(lines), dtype=torch.int32), cache, shape)
        found = cache.keys.view(-1, 2)[: len(lines), 1].view(torch.float8_e4m3fn).float()
        assert torch.equal(found, numbers.to(torch.float8_e4m3fn).float())


def test_wrong_layouts_are_refused() -> None:
    setup = Setup(Case(sections=(2, 3, 3)))
    arguments = (setup.cache, setup.shape, setup.rotary)
    with pytest.raises(ValueError, match=r"positions for sections must be \[3, 7\]"):
        rotate_and_cache(setup.qkv, setup.positions[0], setup.index, *arguments)
    with pytest.raises(ValueError, match=r"qkv must be contiguous and \[tokens, 128\]"):
        rotate_and_cache(setup.qkv[:, :64], setup.positions, setup.index, *arguments)
    with pytest.raises(RuntimeError, match="different devices"):
        rotate_and_cache(setup.qkv, setup.positions.to("meta"), setup.index, *arguments)
    transposed = torch.randn(7, 16, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="must be contiguous"):
        write_cache(transposed, transposed, setup.index, setup.cache, setup.shape)
