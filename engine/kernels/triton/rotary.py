"""Rotary embedding, norms of heads, and the write of keys and values into the cache, in one kernel.

A program takes lines: a line is one head of one token, queries, keys and values in the order of the qkv projection. The
dims of a head are taken in pairs, first those that are rotated together, then the rest:

    halves        dims i and rotary dims / 2 + i, as in GPT-NeoX and Llama
    interleaved   dims 2 i and 2 i + 1, the order of the paper (Su et al. 2021, https://arxiv.org/abs/2104.09864)
    rest          no rotation: rotary dims + i and rotary dims + (head dim - rotary dims) / 2 + i
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton import launch
from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.kv_storage import LayerCache, to_stored

LINES = 16  # heads of tokens that a program takes
INTERPRETED_LINES = 512


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotary embedding of a layer.

    cos, sin: float32[positions, pairs], pairs of dims that are rotated; factors such as YaRN's are included.
    interleaved: which dims make a pair, see above.
    sections: how many pairs take the temporal, the height and the width position (M-RoPE); None: one position a token.
    interleaved_sections: pairs take the three positions in turn, as far as the sections go (Qwen3-VL), not one after
        the other (Qwen2-VL).
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False
    sections: tuple[int, int, int] | None = None
    interleaved_sections: bool = False


def rotate_and_cache(
    qkv: Tensor,
    positions: Tensor,
    cache_index: Tensor,
    cache: LayerCache,
    shape: AttentionShape,
    rotary: Rotary | None,
    norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 1e-6,
) -> None:
    """Normalize and rotate queries in place; normalize and rotate keys, and write keys and values to the cache.

    Args:
        qkv: [tokens, (heads + 2 kv heads) * head dim], contiguous. Its keys and values are left as they are.
        positions: int32[tokens], or int32[3, tokens] with sections.
        cache_index: int32[tokens], block * block size + offset in the block; -1: padding, nothing is read or written.
        rotary: None for layers without rotation.
        norms: RMS norm weights of a query and of a key, [head dim] each; None: no norm.

    Raises:
        RuntimeError: the arguments are on different devices.
    """
    query_norm, key_norm = norms or (None, None)
    cos, sin = (rotary.cos, rotary.sin) if rotary else (None, None)
    launch.check_device(
        qkv, positions, cache_index, cache.keys, cache.values, cache.key_scales, cache.value_scales, cos, sin,
        query_norm, key_norm,
    )  # fmt: skip
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    if qkv.shape[1] != width or not qkv.is_contiguous() or shape.head_dim % 2:
        raise ValueError(f"qkv must be contiguous and [tokens, {width}], not {list(qkv.shape)}")
    sections = rotary.sections if rotary else None
    if sections and positions.shape != (3, len(qkv)):
        raise ValueError(f"positions for sections must be [3, {len(qkv)}], not {list(positions.shape)}")
    lines = len(qkv) * (shape.heads + 2 * shape.kv_heads)
    constants = rotary_constants(shape, rotary)
    rotate_kernel[(triton.cdiv(lines, constants["LINES"]),)](
        qkv, cos, sin, positions, cache_index, cache.keys, cache.values, cache.key_scales, cache.value_scales,
        query_norm, key_norm, epsilon, cache.largest, len(qkv), positions.stride(0), **constants,
    )  # fmt: skip


def rotary_constants(shape: AttentionShape, rotary: Rotary | None) -> dict[str, int]:
    """The constants of `rotate_kernel`."""
    sections = (rotary.sections if rotary else None) or (0, 0, 0)
    return {
        "HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "DIM": shape.head_dim, "BLOCK": shape.block_size,
        "PAIRS": rotary.cos.shape[1] if rotary else 0, "PAIRS_P": launch.next_power_of_2(shape.head_dim // 2),
        "INTERLEAVED": bool(rotary and rotary.interleaved),
        "SECTIONS": 0 if not any(sections) else 2 if rotary and rotary.interleaved_sections else 1,
        "TEMPORAL": sections[0], "HEIGHT": sections[1], "WIDTH": sections[2],
        "LINES": INTERPRETED_LINES if launch.interpreted() else LINES,
    }  # fmt: skip


def write_cache(keys: Tensor, values: Tensor, cache_index: Tensor, cache: LayerCache, shape: AttentionShape) -> None:
    """Write keys and values that are already rotated: [tokens, kv heads, head dim], head dim contiguous.

    Args:
        cache_index: as in `rotate_and_cache`.
    """
    launch.check_device(keys, values, cache_index, cache.keys, cache.values, cache.key_scales, cache.value_scales)
    if keys.stride(2) != 1 or values.stride(2) != 1:
        raise ValueError("the dims of a head must be contiguous")
    lines = INTERPRETED_LINES if launch.interpreted() else LINES
    grid = (triton.cdiv(len(keys) * shape.kv_heads, lines),)
    write_kernel[grid](
        keys, values, cache_index, cache.keys, cache.values, cache.key_scales, cache.value_scales, cache.largest,
        len(keys), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        KV_HEADS=shape.kv_heads, DIM=shape.head_dim, BLOCK=shape.block_size,
        PAIRS_P=launch.next_power_of_2(shape.head_dim // 2), LINES=lines,
    )  # fmt: skip


@triton.jit
def _stored_pairs(a, b, scales, stored, mask, largest, ELEMENT: tl.constexpr):
    """Pairs of dims as elements of the cache; in 8 bits the scale of each line is stored beside."""
    if scales is not None:
        size = tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))
        tl.store(scales + stored, size / largest, mask=mask)
        inverse = tl.where(size > 0, largest / tl.maximum(size, 1e-30), 0.0)[:, None]
        first, second = to_stored(a * inverse, largest, ELEMENT), to_stored(b * inverse, largest, ELEMENT)
    else:
        first, second = a.to(ELEMENT), b.to(ELEMENT)
    return first, second


@triton.jit
def _normalize(a, b, first, second, pairs, is_query, is_key, query_norm, key_norm, epsilon, DIM: tl.constexpr):
    """RMS norm of the lines of queries and keys (https://arxiv.org/abs/1910.07467)."""
    scale = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + epsilon)
    scale = tl.where(is_query | is_key, scale, 1.0)[:, None]
    of_query, of_key = is_query[:, None] & pairs[None, :], is_key[:, None] & pairs[None, :]
    weight_a = tl.load(query_norm + first[None, :], mask=of_query, other=1.0).to(tl.float32)
    weight_b = tl.load(query_norm + second[None, :], mask=of_query, other=1.0).to(tl.float32)
    weight_a *= tl.load(key_norm + first[None, :], mask=of_key, other=1.0).to(tl.float32)
    weight_b *= tl.load(key_norm + second[None, :], mask=of_key, other=1.0).to(tl.float32)
    return a * scale * weight_a, b * scale * weight_b


@triton.jit
def _pair_positions(
    positions, token, pair, mask, axis_stride,
    SECTIONS: tl.constexpr, TEMPORAL: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The position by which each pair of each line is rotated."""
    axis = tl.zeros(pair.shape, tl.int32)
    if SECTIONS == 1:
        axis = (pair >= TEMPORAL).to(tl.int32) + (pair >= TEMPORAL + HEIGHT).to(tl.int32)
    if SECTIONS == 2:
        axis = tl.where((pair % 3 == 1) & (pair < 3 * HEIGHT), 1, axis)
        axis = tl.where((pair % 3 == 2) & (pair < 3 * WIDTH), 2, axis)
    return tl.load(positions + axis[None, :] * axis_stride + token[:, None], mask=mask, other=0)


@triton.jit
def rotate_kernel(
    qkv, cos, sin, positions, cache_index, keys, values, key_scales, value_scales, query_norm, key_norm,
    epsilon, largest, tokens, axis_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
    PAIRS_P: tl.constexpr, INTERLEAVED: tl.constexpr, SECTIONS: tl.constexpr, TEMPORAL: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Norm, rotation and write of LINES lines."""
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    token, head = line // ALL, line % ALL
    index = tl.load(cache_index + token, mask=token < tokens, other=-1)
    live = index >= 0
    is_query, is_value = live & (head < HEADS), live & (head >= HEADS + KV_HEADS)
    is_key = live & (head >= HEADS) & (head < HEADS + KV_HEADS)
    pair = tl.arange(0, PAIRS_P)
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + PAIRS
    first = tl.where(pair < PAIRS, first, pair + PAIRS)
    second = tl.where(pair < PAIRS, second, pair + DIM // 2)
    lanes = live[:, None] & (pair < DIM // 2)[None, :]
    at = line.to(tl.int64)[:, None] * DIM
    a = tl.load(qkv + at + first[None, :], mask=lanes, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + second[None, :], mask=lanes, other=0.0).to(tl.float32)
    if query_norm is not None:
        a, b = _normalize(a, b, first, second, pair < DIM // 2, is_query, is_key, query_norm, key_norm, epsilon, DIM)
    if PAIRS > 0:
        turned = (is_query | is_key)[:, None] & (pair < PAIRS)[None, :]
        position = _pair_positions(positions, token, pair, turned, axis_stride, SECTIONS, TEMPORAL, HEIGHT, WIDTH)
        of_table = position * PAIRS + pair[None, :]
        c = tl.load(cos + of_table, mask=turned, other=1.0)
        s = tl.load(sin + of_table, mask=turned, other=0.0)
        a, b = a * c - b * s, b * c + a * s
    tl.store(qkv + at + first[None, :], a.to(qkv.dtype.element_ty), mask=lanes & is_query[:, None])
    tl.store(qkv + at + second[None, :], b.to(qkv.dtype.element_ty), mask=lanes & is_query[:, None])
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    stored = ((index // BLOCK).to(tl.int64) * KV_HEADS + kv_head) * BLOCK + index % BLOCK
    place = stored[:, None] * DIM
    ELEMENT: tl.constexpr = keys.dtype.element_ty
    x, y = _stored_pairs(a, b, key_scales, stored, is_key, largest, ELEMENT)
    tl.store(keys + place + first[None, :], x, mask=lanes & is_key[:, None])
    tl.store(keys + place + second[None, :], y, mask=lanes & is_key[:, None])
    x, y = _stored_pairs(a, b, value_scales, stored, is_value, largest, ELEMENT)
    tl.store(values + place + first[None, :], x, mask=lanes & is_value[:, None])
    tl.store(values + place + second[None, :], y, mask=lanes & is_value[:, None])


@triton.jit
def write_kernel(
    new_keys, new_values, cache_index, keys, values, key_scales, value_scales, largest,
    tokens, key_stride, key_head_stride, value_stride, value_head_stride,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PAIRS_P: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Write LINES heads of keys and of values."""
    HALF: tl.constexpr = DIM // 2
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    token, head = line // KV_HEADS, line % KV_HEADS
    index = tl.load(cache_index + token, mask=token < tokens, other=-1)
    live = index >= 0
    d = tl.arange(0, PAIRS_P)[None, :]
    lanes = live[:, None] & (d < HALF)
    stored = ((index // BLOCK).to(tl.int64) * KV_HEADS + head) * BLOCK + index % BLOCK
    place = stored[:, None] * DIM + d
    ELEMENT: tl.constexpr = keys.dtype.element_ty
    at = (token.to(tl.int64) * key_stride + head * key_head_stride)[:, None] + d
    a = tl.load(new_keys + at, mask=lanes, other=0.0).to(tl.float32)
    b = tl.load(new_keys + at + HALF, mask=lanes, other=0.0).to(tl.float32)
    x, y = _stored_pairs(a, b, key_scales, stored, live, largest, ELEMENT)
    tl.store(keys + place, x, mask=lanes)
    tl.store(keys + place + HALF, y, mask=lanes)
    at = (token.to(tl.int64) * value_stride + head * value_head_stride)[:, None] + d
    a = tl.load(new_values + at, mask=lanes, other=0.0).to(tl.float32)
    b = tl.load(new_values + at + HALF, mask=lanes, other=0.0).to(tl.float32)
    x, y = _stored_pairs(a, b, value_scales, stored, live, largest, ELEMENT)
    tl.store(values + place, x, mask=lanes)
    tl.store(values + place + HALF, y, mask=lanes)
