"""How keys and values are stored: as they are, or in 8 bits with a float32 scale for each token and head.

int8: the integers -127 to 127, the scale is the largest magnitude / 127. fp8 (e4m3, 3 bits of mantissa): up to 448. A
cache of float8_e4m3fn is read with the target's own conversion. Where it has none (compute capability below 8.9,
gfx942) the cache is passed as uint8, and the conversion is by bits through float16.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

EIGHT_BITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.uint8: 448.0}  # the largest number of each


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer slot of the KV cache.

    keys, values: [blocks, kv heads, block size, head dim], contiguous, in the dtype of the model or in 8 bits.
    key_scales, value_scales: float32[blocks, kv heads, block size] of a cache in 8 bits, else None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def __post_init__(self) -> None:
        if not (self.keys.is_contiguous() and self.values.is_contiguous()):
            raise ValueError("keys and values of a cache must be contiguous")
        if (self.keys.dtype in EIGHT_BITS) != (self.key_scales is not None and self.value_scales is not None):
            raise ValueError(f"a cache of {self.keys.dtype} has scales if and only if its numbers have 8 bits")

    @property
    def quantized(self) -> bool:
        return self.key_scales is not None

    @property
    def largest(self) -> float:
        """The largest number of a cache in 8 bits."""
        return EIGHT_BITS.get(self.keys.dtype, 0.0)


@triton.jit
def load_stored(stored, DOT: tl.constexpr):
    """Numbers loaded from a cache in the dtype of products, without their scales."""
    if stored.dtype == tl.uint8:
        bits = ((stored & 0x7F).to(tl.uint16) << 7) | ((stored & 0x80).to(tl.uint16) << 8)
        numbers = (bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(DOT)
    else:
        numbers = stored.to(DOT)
    return numbers


@triton.jit
def round_to_integer(x):
    """The nearest integers, ties to even, of |x| < 2^22: float32 has no digits after the point near 1.5 * 2^23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to_e4m3(x):
    """The nearest numbers of e4m3, ties to even, as float32. x: float32 within [-448, 448]."""
    size = tl.abs(x)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
    subnormal = (size + 16384.0) - 16384.0  # multiples of 2^-9
    rounded = tl.where(size < 0.015625, subnormal, normal)
    return tl.where(x < 0, -rounded, rounded)


@triton.jit
def to_stored(x, largest, ELEMENT: tl.constexpr):
    """float32 numbers, already divided by their scale, as elements of a cache in 8 bits."""
    x = tl.minimum(tl.maximum(x, -largest), largest)
    if ELEMENT == tl.int8:
        stored = round_to_integer(x).to(tl.int8)
    else:
        rounded = round_to_e4m3(x)
        if ELEMENT == tl.uint8:
            half = (tl.abs(rounded) * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True)
            stored = ((half >> 7) & 0x7F).to(tl.uint8) | tl.where(x < 0, 0x80, 0).to(tl.uint8)
        else:
            stored = rounded.to(ELEMENT)
    return stored
