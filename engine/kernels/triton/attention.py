"""Ragged paged attention in Triton: decoding with split keys, chunked prefill, and batches of both.

A program computes a tile of queries of one batch row with all heads that share a KV head, so that keys are loaded once:
line m of a tile is query `first + m // GROUP` and head `m % GROUP` of the KV head's group (padded to a power of two).
What a program computes is in the work list (see `engine.kernels.work_list`). Scores are in units of log2, so that exp2
needs no multiplication. Softmax is computed online, as in FlashAttention (Dao 2022, https://arxiv.org/abs/2205.14135),
keys of a row in parts as in Flash-Decoding (https://pytorch.org/blog/flash-decoding/).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.triton import launch
from engine.kernels.triton.kv_storage import LayerCache, load_stored
from engine.kernels.work_list import Capacity, Tiling, Tilings

LOG2_E = math.log2(math.e)
MIN_LINES = 16  # of a tile: the least that `tl.dot` takes
MERGE_NUMBERS = 16384  # of partial results that a program of the merge loads at a time
MERGE_WARPS = 8


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Shape of a layer's attention on this rank."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    @property
    def padded_group(self) -> int:
        return launch.next_power_of_2(self.heads // self.kv_heads)

    @property
    def padded_dim(self) -> int:
        return max(launch.next_power_of_2(self.head_dim), MIN_LINES)

    @property
    def decode_queries(self) -> int:
        """Queries of the smallest tile: what a product takes anyway is used for draft tokens."""
        return max(MIN_LINES // self.padded_group, 1)

    @property
    def place_lines(self) -> int:
        """Lines of a place of `Partials`."""
        return self.decode_queries * self.padded_group


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer turns products of queries and keys into attention weights.

    window: tokens that a query sees, itself included. sinks: [heads], the score of each head's attention sink.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch on the device; padded rows have no tokens.

    tables: int32[rows, blocks]; starts, counts, num_computed: int32[rows], as in `engine.kernels.attention.Ragged`.
    slots: int32[rows], the row of `tables` of each batch row; None: the same.
    ends: int32[tokens], for layers with bidirectional spans, as in `work_list.plan_work`; None: causal.
    """

    tables: Tensor
    starts: Tensor
    counts: Tensor
    num_computed: Tensor
    slots: Tensor | None = None
    ends: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """A work list on the device, int32 as in `work_list.WorkList`; None: the launch is left out."""

    sizes: Tensor
    decode: Tensor | None
    prefill: Tensor | None
    merges: Tensor | None


@dataclass(frozen=True, slots=True)
class Partials:
    """Results of parts, which the merge adds up; all layers use the same buffers.

    sums: float32[places, kv heads, lines, padded dim], weighted sums of values.
    tops, weights: float32[places, kv heads, lines], the largest score and the sum of the weights relative to it.
    """

    sums: Tensor
    tops: Tensor
    weights: Tensor

    @classmethod
    def allocate(cls, shape: AttentionShape, capacity: Capacity, device: torch.device | str) -> "Partials":
        lines = (max(capacity.places, 1), shape.kv_heads, shape.place_lines)
        sums = torch.empty((*lines, shape.padded_dim), dtype=torch.float32, device=device)
        return cls(sums, sums.new_empty(lines), sums.new_empty(lines))


def paged_attention(
    query: Tensor,
    cache: LayerCache,
    out: Tensor,
    rows: Rows,
    work: Work,
    shape: AttentionShape,
    tilings: Tilings,
    scores: Scores,
    partials: Partials,
) -> None:
    """Attention over the cache, which already has the keys and values of this step.

    Args:
        query: [tokens, heads, head dim], or a view of the queries in the output of the qkv projection.
        out: [tokens, heads, head dim], contiguous; tokens of no row are left as they are.
        tilings: those that `work` was planned with.

    Raises:
        RuntimeError: the arguments are on different devices.
    """
    launch.check_device(
        query, cache.keys, cache.values, cache.key_scales, cache.value_scales, out, rows.tables, rows.starts,
        rows.counts, rows.num_computed, rows.slots, rows.ends, work.sizes, work.decode, work.prefill, work.merges,
        scores.sinks, partials.sums, partials.tops, partials.weights,
    )  # fmt: skip
    if query.stride(1) != shape.head_dim or query.stride(2) != 1 or not out.is_contiguous():
        raise ValueError("heads of a query must be side by side, and out must be contiguous")
    if tilings.decode.queries != shape.decode_queries:
        raise ValueError(
            f"decode tiles of {tilings.decode.queries} queries, but the shape needs {shape.decode_queries}"
        )
    for which, (items, tiling) in enumerate(((work.decode, tilings.decode), (work.prefill, tilings.prefill))):
        if items is None:
            continue
        attend_kernel[(tiling.programs, shape.kv_heads)](
            query, cache.keys, cache.values, cache.key_scales, cache.value_scales, out,
            partials.sums, partials.tops, partials.weights, scores.sinks,
            items, work.sizes, rows.starts, rows.counts, rows.num_computed, rows.tables, rows.slots, rows.ends,
            scores.scaling * LOG2_E, scores.softcap or 0.0, query.stride(0), rows.tables.stride(0),
            **attend_constants(shape, scores, tiling, query.dtype, which),
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
    if work.merges is not None:
        merge_kernel[(tilings.decode.programs, shape.kv_heads)](
            out, partials.sums, partials.tops, partials.weights, work.merges, work.sizes, rows.starts, rows.counts,
            **merge_constants(shape), num_warps=MERGE_WARPS,
        )  # fmt: skip


def merge_constants(shape: AttentionShape) -> dict[str, object]:
    """The constants of `merge_kernel`."""
    # Four parts of heads of 256 dims spilled 12 bytes on sm_80.
    numbers = MERGE_NUMBERS if shape.padded_dim <= 128 else MERGE_NUMBERS // 2
    parts = max(numbers // (shape.place_lines * shape.padded_dim), 1)
    return _shape_constants(shape) | {"PARTS": parts}


def _shape_constants(shape: AttentionShape) -> dict[str, object]:
    return {
        "HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "DIM": shape.head_dim, "DIM_P": shape.padded_dim,
        "GROUP_P": shape.padded_group, "PLACE_LINES": shape.place_lines,
    }  # fmt: skip


def attend_constants(
    shape: AttentionShape, scores: Scores, tiling: Tiling, dtype: torch.dtype, which: int
) -> dict[str, object]:
    """The constants of `attend_kernel`. which: 0 decode, 1 prefill."""
    return _shape_constants(shape) | {
        "BLOCK": shape.block_size, "TILE": tiling.keys, "QUERIES": tiling.queries, "WINDOW": scores.window or 0,
        "CAPPED": scores.softcap is not None, "EDGES": which == 1, "WHICH": which,
        "DOT": launch.dot_dtype(dtype), "PRECISION": launch.dot_precision(dtype),
    }  # fmt: skip


@triton.jit
def _attend_keys(
    q, top, weight, mixed, begin, stop, high, end, lowest,
    keys, values, key_scales, value_scales, table, head, scaling, softcap,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_P: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys begin..stop in steps of TILE to the softmax of a tile.

    MASKED: some keys are at or beyond `high`, or some queries don't see them.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    d = tl.arange(0, DIM_P)
    for key in range(begin, stop, TILE):
        position = key + tl.arange(0, TILE)
        in_part = position < high
        if MASKED:
            block = tl.load(table + position // BLOCK, mask=in_part, other=0)
        else:
            block = tl.load(table + position // BLOCK)
        stored = (block.to(tl.int64) * KV_HEADS + head) * BLOCK + position % BLOCK
        at = stored[:, None] * DIM + d[None, :]
        if MASKED:
            mask = in_part[:, None] & (d < DIM)[None, :]
            k = tl.load(keys + at, mask=mask, other=0.0)
            v = tl.load(values + at, mask=mask, other=0.0)
        elif DIM < DIM_P:
            mask = (d < DIM)[None, :]
            k = tl.load(keys + at, mask=mask, other=0.0)
            v = tl.load(values + at, mask=mask, other=0.0)
        else:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        s = tl.dot(q, tl.trans(load_stored(k, DOT)), input_precision=PRECISION) * scaling
        if key_scales is not None:
            s *= tl.load(key_scales + stored, mask=in_part, other=0.0)[None, :]
        if CAPPED:  # tanh(x) = 1 - 2 / (exp(2x) + 1)
            s = (softcap * LOG2E) * (1.0 - 2.0 / (tl.exp2(2.0 * s / softcap) + 1.0))
        if MASKED:
            visible = (position[None, :] < end[:, None]) & in_part[None, :]
            if WINDOW > 0:
                visible &= position[None, :] >= lowest[:, None]
            s = tl.where(visible, s, -1e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        if MASKED:
            p = tl.where(visible, p, 0.0)
        weight = weight * fade + tl.sum(p, 1)
        if value_scales is not None:
            p *= tl.load(value_scales + stored, mask=in_part, other=0.0)[None, :]
        mixed = mixed * fade[:, None] + tl.dot(p.to(DOT), load_stored(v, DOT), input_precision=PRECISION)
        top = new_top
    return top, weight, mixed


@triton.jit
def _full_tiles(low, high, first_position, last_position, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Where the tiles begin and end whose keys all queries see: from low in steps of TILE."""
    begin = low
    if WINDOW > 0:
        begin += tl.cdiv(tl.maximum(last_position - WINDOW + 1 - low, 0), TILE) * TILE
    begin = tl.minimum(begin, high)
    full = tl.maximum(tl.minimum(high, first_position + 1) - begin, 0) // TILE
    return begin, begin + full * TILE


@triton.jit
def _count_sinks(sinks, heads, live, is_first):
    """The largest score and the sum of weights before any key. A sink is a key without a value, in the first part."""
    LOG2E: tl.constexpr = 1.4426950408889634
    top = tl.zeros(heads.shape, tl.float32) - 1e30
    weight = tl.zeros(heads.shape, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=live, other=0.0).to(tl.float32) * LOG2E
        top = tl.where(is_first > 0, sink, top)
        weight = tl.where(is_first > 0, 1.0, weight)
    return top, weight


@triton.jit
def attend_kernel(
    query, keys, values, key_scales, value_scales, out, sums, tops, weights, sinks,
    items, sizes, starts, counts, num_computed, tables, slots, ends, scaling, softcap, token_stride, table_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_P: tl.constexpr, GROUP_P: tl.constexpr,
    PLACE_LINES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, EDGES: tl.constexpr, WHICH: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the items of a work list. EDGES: tiles that all queries see have a loop without masks of their own."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    head = tl.program_id(1)
    m = tl.arange(0, QUERIES * GROUP_P)
    member = m % GROUP_P
    d = tl.arange(0, DIM_P)
    for item in range(tl.program_id(0), tl.load(sizes + WHICH), tl.num_programs(0)):
        row = tl.load(items + item * 6)
        first = tl.load(items + item * 6 + 1)
        low = tl.load(items + item * 6 + 2)
        high = tl.load(items + item * 6 + 3)
        place = tl.load(items + item * 6 + 4)
        count, computed = tl.load(counts + row), tl.load(num_computed + row)
        local = first + m // GROUP_P
        live = (local < count) & (member < GROUP)
        token = (tl.load(starts + row) + local).to(tl.int64)
        lanes = live[:, None] & (d < DIM)[None, :]
        in_token = (head * GROUP + member)[:, None] * DIM + d[None, :]
        q = tl.load(query + token[:, None] * token_stride + in_token, mask=lanes, other=0.0).to(DOT)
        lowest = computed + local - WINDOW + 1
        end = computed + local + 1
        if ends is not None:
            end = tl.load(ends + token, mask=local < count, other=0)
        table = tables + (tl.load(slots + row) if slots is not None else row).to(tl.int64) * table_width
        top, weight = _count_sinks(sinks, head * GROUP + member, live, tl.load(items + item * 6 + 5))
        mixed = tl.zeros([QUERIES * GROUP_P, DIM_P], tl.float32)
        full = low
        if EDGES:
            last = tl.minimum(first + QUERIES, count) - 1
            begin, full = _full_tiles(low, high, computed + first, computed + last, TILE, WINDOW)
            if WINDOW > 0:
                top, weight, mixed = _attend_keys(
                    q, top, weight, mixed, low, begin, high, end, lowest,
                    keys, values, key_scales, value_scales, table, head, scaling, softcap,
                    KV_HEADS, DIM, DIM_P, BLOCK, TILE, WINDOW, CAPPED, True, DOT, PRECISION,
                )  # fmt: skip
            top, weight, mixed = _attend_keys(
                q, top, weight, mixed, begin, full, high, end, lowest,
                keys, values, key_scales, value_scales, table, head, scaling, softcap,
                KV_HEADS, DIM, DIM_P, BLOCK, TILE, WINDOW, CAPPED, False, DOT, PRECISION,
            )  # fmt: skip
        top, weight, mixed = _attend_keys(
            q, top, weight, mixed, full, high, high, end, lowest,
            keys, values, key_scales, value_scales, table, head, scaling, softcap,
            KV_HEADS, DIM, DIM_P, BLOCK, TILE, WINDOW, CAPPED, True, DOT, PRECISION,
        )  # fmt: skip
        if place >= 0:
            to = ((place + m // PLACE_LINES) * KV_HEADS + head).to(tl.int64) * PLACE_LINES + m % PLACE_LINES
            tl.store(tops + to, top, mask=live)
            tl.store(weights + to, weight, mask=live)
            tl.store(sums + to[:, None] * DIM_P + d[None, :], mixed, mask=live[:, None])
        else:
            result = mixed / tl.maximum(weight, 1e-30)[:, None]
            tl.store(out + token[:, None] * (HEADS * DIM) + in_token, result.to(out.dtype.element_ty), mask=lanes)


@triton.jit
def merge_kernel(
    out, sums, tops, weights, merges, sizes, starts, counts,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, DIM_P: tl.constexpr, GROUP_P: tl.constexpr,
    PLACE_LINES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add up the parts of tiles, PARTS at a time: their loads don't wait for each other."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    head = tl.program_id(1)
    m = tl.arange(0, PLACE_LINES)
    member = m % GROUP_P
    d = tl.arange(0, DIM_P)
    for merge in range(tl.program_id(0), tl.load(sizes + 2), tl.num_programs(0)):
        row = tl.load(merges + merge * 5)
        place = tl.load(merges + merge * 5 + 2)
        parts = tl.load(merges + merge * 5 + 3)
        stride = tl.load(merges + merge * 5 + 4)
        local = tl.load(merges + merge * 5 + 1) + m // GROUP_P
        live = (local < tl.load(counts + row)) & (member < GROUP)
        top = tl.full([PLACE_LINES], -1e30, tl.float32)
        weight = tl.zeros([PLACE_LINES], tl.float32)
        mixed = tl.zeros([PLACE_LINES, DIM_P], tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            of = ((place + part * stride) * KV_HEADS + head).to(tl.int64)[:, None] * PLACE_LINES + m[None, :]
            lanes = (part < parts)[:, None] & live[None, :]
            other = tl.load(tops + of, mask=lanes, other=-1e30)
            more = tl.load(sums + of[:, :, None] * DIM_P + d[None, None, :], mask=lanes[:, :, None], other=0.0)
            new_top = tl.maximum(top, tl.max(other, 0))
            mine, theirs = tl.exp2(top - new_top), tl.exp2(other - new_top[None, :])
            mixed = mixed * mine[:, None] + tl.sum(more * theirs[:, :, None], 0)
            weight = weight * mine + tl.sum(tl.load(weights + of, mask=lanes, other=0.0) * theirs, 0)
            top = new_top
        token = (tl.load(starts + row) + local).to(tl.int64)
        at = token[:, None] * (HEADS * DIM) + (head * GROUP + member)[:, None] * DIM + d[None, :]
        result = mixed / tl.maximum(weight, 1e-30)[:, None]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=live[:, None] & (d < DIM)[None, :])
