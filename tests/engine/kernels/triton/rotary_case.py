"""Norms of heads, rotation and the write into the cache: random cases, and float64 torch to compare with."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.kv_storage import EIGHT_BITS, LayerCache
from engine.kernels.triton.rotary import Rotary, rotate_and_cache

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


class Setup:
    def __init__(self, case: Case, device: torch.device | str = "cpu"):
        self.case = case
        self.device = device
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

        self._place()

    def _place(self) -> None:
        """Put what the kernel takes on the device."""
        place = self.device
        self.index, self.qkv, self.positions = (one.to(place) for one in (self.index, self.qkv, self.positions))
        self.live = self.live.to(place)
        if self.rotary is not None:
            self.rotary = replace(self.rotary, cos=self.rotary.cos.to(place), sin=self.rotary.sin.to(place))
        if self.norms is not None:
            self.norms = self.norms[0].to(place), self.norms[1].to(place)
        stored = (self.cache.keys, self.cache.values, self.cache.key_scales, self.cache.value_scales)
        self.cache = LayerCache(*(None if one is None else one.to(place) for one in stored))

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
                for place in range(of_axis, 3 * case.sections[of_axis], 3):
                    axis[place] = of_axis
        at = positions[axis].T  # [tokens, pairs]
        cos, sin = (
            table.double()[at, torch.arange(pairs, device=x.device)][:, None] for table in (rotary.cos, rotary.sin)
        )
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
        found = numbers.double()[at]
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
        untouched = torch.ones(stored.shape[:3], dtype=torch.bool, device=stored.device)
        untouched[at] = False
        assert (
            numbers.double()[untouched] == float(torch.tensor(UNTOUCHED).to(stored.dtype).view(numbers.dtype))
        ).all()


def run_and_check(case: Case, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Returns what the kernel wrote."""
    setup = Setup(case, device)
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
    return setup.qkv, setup.cache.keys, setup.cache.values
