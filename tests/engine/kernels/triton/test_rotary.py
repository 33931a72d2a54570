"""Norms of heads, rotation and the write into the cache, against float64 torch."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.kv_storage import EIGHT_BITS, LayerCache
from engine.kernels.triton.rotary import Rotary, rotate_and_cache, write_cache

EPSILON = 1e-5
POSITIONS = 50
UNTOUCHED = 3.0
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    tokens: int = 7
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int = 16  # 0: no rotation
    interleaved: bool = False
    sections: tuple[int, int, int] | None = None
    interleaved_sections: bool = False
    norms: bool = False
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    seed: int = 0


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


class Setup:
    def __init__(self, case: Case):
        self.case = case
        torch.manual_seed(case.seed)
        random = np.random.default_rng(case.seed)
        self.shape = AttentionShape(case.heads, case.kv_heads, case.head_dim, case.block_size)
        blocks = case.tokens // case.block_size + 3
        index = random.permutation((blocks - 1) * case.block_size)[: case.tokens] + case.block_size
        self.index = torch.from_numpy(np.where(random.random(case.tokens) < 0.3, -1, index).astype(np.int32))
        self.live = self.index >= 0
        self.qkv = torch.randn(case.tokens, (case.heads + 2 * case.kv_heads) * case.head_dim).to(case.dtype)
        self.qkv[~self.live] = float("nan")
        axes = (3, case.tokens) if case.sections else (case.tokens,)
        self.positions = torch.from_numpy(random.integers(0, POSITIONS, axes).astype(np.int32))
        self.rotary = None
        if case.rotary_dim:
            angles = torch.randn(POSITIONS, case.rotary_dim // 2, dtype=torch.float64) * 3
            self.rotary = Rotary(
                angles.cos().float(), angles.sin().float(), case.interleaved, case.sections, case.interleaved_sections
            )
        self.norms = (torch.rand(case.head_dim) + 0.5, torch.rand(case.head_dim) + 0.5) if case.norms else None
        self.cache = empty_cache(blocks, self.shape, case.cache_dtype or case.dtype)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all tokens in float64."""
        case = self.case
        heads = self.qkv.double().view(case.tokens, -1, case.head_dim)
        query, key, value = heads.split((case.heads, case.kv_heads, case.kv_heads), 1)
        if self.norms:
            query, key = (
                x * (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt() * weight.double()
                for x, weight in zip((query, key), self.norms, strict=True)
            )
        return self._rotate(query), self._rotate(key), value

    def _rotate(self, x: Tensor) -> Tensor:
        case, rotary = self.case, self.rotary
        if rotary is None:
            return x
        pairs = case.rotary_dim // 2
        positions = self.positions.long().expand(3, case.tokens) if not case.sections else self.positions.long()
        axis = [0] * pairs
        if case.sections and not case.interleaved_sections:
            axis = [0] * case.sections[0] + [1] * case.sections[1] + [2] * case.sections[2]
        elif case.sections:
            for of_axis in (1, 2):
                for pair in range(of_axis, 3 * case.sections[of_axis], 3):
                    axis[pair] = of_axis
        at = positions[axis].T  # [tokens, pairs]
        cos, sin = (table.double()[at, torch.arange(pairs)][:, None] for table in (rotary.cos, rotary.sin))
        turned, rest = x[..., : case.rotary_dim], x[..., case.rotary_dim :]
        a, b = (turned[..., ::2], turned[..., 1::2]) if case.interleaved else turned.chunk(2, -1)
        new = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.stack(new, -1).flatten(-2) if case.interleaved else torch.cat(new, -1)
        return torch.cat((turned, rest), -1)


def empty_cache(blocks: int, shape: AttentionShape, dtype: torch.dtype) -> LayerCache:
    size = (blocks, shape.kv_heads, shape.block_size, shape.head_dim)
    keys, values = (torch.full(size, UNTOUCHED).to(dtype) for _ in range(2))
    if dtype not in EIGHT_BITS:
        return LayerCache(keys, values)
    return LayerCache(keys, values, torch.full(size[:3], UNTOUCHED), torch.full(size[:3], UNTOUCHED))


def check_cache(cache: LayerCache, index: Tensor, keys: Tensor, values: Tensor, tolerance: float) -> None:
    """Compare what is stored at `index` with keys and values [tokens, kv heads, dim]; nothing else was written."""
    live = index[index >= 0].long()
    size = cache.keys.shape[2]
    at = (live // size, slice(None), live % size)
    for stored, scales, expected in (
        (cache.keys, cache.key_scales, keys[index >= 0]),
        (cache.values, cache.value_scales, values[index >= 0]),
    ):
        numbers = stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored
        found = numbers[at].double()
        if scales is None:
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        else:
            largest = EIGHT_BITS[stored.dtype]
            scale = expected.abs().amax(-1, keepdim=True) / largest
            torch.testing.assert_close(scales[at].double()[..., None], scale, rtol=1e-4, atol=1e-6)
            # half of a step: 1 of int8; of e4m3 2^-3 of the power of two below a number, and at least 2^-9
            scaled = expected / scale.clamp(min=1e-30)
            step = torch.ones_like(scaled)
            if stored.dtype != torch.int8:
                step = torch.exp2(scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
            assert ((found - scaled).abs() <= 0.501 * step + tolerance * largest).all()
        untouched = torch.ones(stored.shape[:3], dtype=torch.bool)
        untouched[at] = False
        assert (
            numbers.double()[untouched] == float(torch.tensor(UNTOUCHED).to(stored.dtype).view(numbers.dtype))
        ).all()


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


def run_and_check(case: Case) -> None:
    setup = Setup(case)
    query, key, value = setup.expected()
    before = setup.qkv.clone()
    rotate_and_cache(
        setup.qkv, setup.positions, setup.index, setup.cache, setup.shape, setup.rotary, setup.norms, EPSILON
    )
    tolerance = TOLERANCE[case.dtype]
    width = case.heads * case.head_dim
    found = setup.qkv[:, :width].double().view_as(query)
    torch.testing.assert_close(found[setup.live], query[setup.live], rtol=tolerance, atol=tolerance)
    assert torch.equal(setup.qkv[:, width:].nan_to_num(9.0), before[:, width:].nan_to_num(9.0))
    assert setup.qkv[~setup.live].isnan().all()
    check_cache(setup.cache, setup.index, key, value, 1e-6 if case.cache_dtype else tolerance)


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
