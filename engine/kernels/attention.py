"""Paged attention over a ragged batch in plain torch: the reference, and the attention of the generic backend.

A layer's keys and values are `[blocks, kv heads, block, head dim]`, so one head's part of a block is a contiguous run,
and a gather by block table needs no transpose. Rows that compute one token are batched by length. A chunk of several
tokens is computed by itself, in tiles of queries against the keys that they can see.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.arrays import Int32s, Int64s

TILE = 64  # queries of a chunk at a time: the scores of a few thousand keys stay in the caches
GROUP_BYTES = 16 << 20  # of gathered keys or values: bounds the workspace of a batch of single tokens
MIN_FILL = 0.75  # ratio of the shortest to the longest row of a group, in blocks


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows laid end to end: row i computes `counts[i]` tokens after `computed[i]`, from token `starts[i]` of the batch.

    tables: int32[rows, blocks], the blocks of each row; entries beyond its length are not read.
    """

    starts: Int64s
    counts: Int64s
    computed: Int64s
    tables: Int32s


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a row that attend to each other besides what comes before them: an image of some models.

    row: of the batch. positions: int64[n], ascending, in the request. The step computes the last of them.
    """

    row: int
    positions: Int64s


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape of a layer's cache."""

    block_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class SingleTokens:
    """Rows that compute one token and have similar lengths, computed in one batch."""

    tokens: Tensor  # int64[rows], tokens of the batch
    index: Tensor  # int64[rows * kv heads * blocks], runs of the cache
    bias: Tensor  # [rows, 1, 1, keys], 0 or -inf
    blocks: int


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries first..last of a chunk, and the gathered keys low..high that they can see."""

    first: int
    last: int
    low: int
    high: int
    lower: Tensor | None  # bias [queries, 1, edge] of the first keys, which some queries' windows exclude


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several tokens of one row."""

    start: int  # first token, in the batch
    index: Tensor  # int64[kv heads * blocks]
    blocks: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class SpanQueries:
    """Some queries of a span, and all keys of their row; computed after the row's chunk, whose results they replace."""

    tokens: Tensor  # int64[queries], tokens of the batch
    index: Tensor  # int64[kv heads * blocks]
    blocks: int
    bias: Tensor  # [queries, 1, keys]


@dataclass(slots=True)
class Plan:
    """Indices and masks of a step, made once for each window size of the model."""

    layout: Layout
    singles: list[SingleTokens] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    spans: list[SpanQueries] = field(default_factory=list)


class Workspace:
    """Two buffers that grow to the size of the largest gather, so that a step allocates no large tensors.

    It also keeps the causal biases of tiles, [count, 1, count] for each number of queries.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self._dtype = dtype
        self._device = device
        self._flat = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]
        self._future: dict[int, Tensor] = {}

    def take(self, which: int, runs: int, width: int) -> Tensor:
        if self._flat[which].numel() < runs * width:
            self._flat[which] = torch.empty(runs * width, dtype=self._dtype, device=self._device)
        return self._flat[which][: runs * width].view(runs, width)

    def future(self, count: int) -> Tensor:
        """Causal bias [count, 1, count] of a tile's queries and their own keys."""
        if count not in self._future:
            bias = torch.full((count, count), -math.inf, dtype=self._dtype, device=self._device)
            self._future[count] = bias.triu_(1)[:, None, :]
        return self._future[count]


def write_index(tables: Int32s, rows: Int64s, positions: Int64s, layout: Layout) -> Tensor:
    """Where keys and values of tokens are stored: int64[tokens * kv heads] into the cache viewed as `[-1, head dim]`.

    Args:
        rows: int64[tokens], each token's row of `tables`.
        positions: int64[tokens].
    """
    block = tables[rows, positions // layout.block_size].astype(np.int64)
    heads = np.arange(layout.kv_heads)
    index = (block[:, None] * layout.kv_heads + heads) * layout.block_size + (positions % layout.block_size)[:, None]
    return torch.from_numpy(index.reshape(-1))


def write(cache: Tensor, index: Tensor, values: Tensor) -> None:
    """Store values [tokens, kv heads, head dim] in a layer's cache."""
    cache.view(-1, cache.shape[-1]).index_copy_(0, index, values.reshape(-1, cache.shape[-1]))


def make_plan(ragged: Ragged, layout: Layout, window: int | None = None, spans: Sequence[Span] = ()) -> Plan:
    """Plan attention over the last `window` tokens, or over all tokens; tokens of a span also see those after them."""
    plan = Plan(layout)
    single = ragged.counts == 1
    if single.any():
        plan.singles = _group_singles(ragged, np.flatnonzero(single), layout, window)
    for i in np.flatnonzero(~single).tolist():
        plan.chunks.append(_make_chunk(ragged, i, layout, window))
    for span in spans:
        plan.spans += _make_span(ragged, span, layout, window)
    return plan


def _group_singles(ragged: Ragged, which: Int64s, layout: Layout, window: int | None) -> list[SingleTokens]:
    positions = ragged.computed[which]
    lowest = np.zeros_like(positions) if window is None else np.maximum(positions - window + 1, 0)
    first_block = lowest // layout.block_size
    lengths = positions // layout.block_size - first_block + 1
    order = np.argsort(-lengths, kind="stable")
    descending = -lengths[order]
    run_bytes = layout.kv_heads * layout.block_size * layout.head_dim * layout.dtype.itemsize
    groups, at = [], 0
    while at < len(order):
        longest = int(-descending[at])
        shortest = min(longest - 2, math.ceil(longest * MIN_FILL))
        end = int(np.searchsorted(descending, -shortest, side="right"))
        end = min(end, at + max(1, GROUP_BYTES // (longest * run_bytes)))
        chosen = order[at:end]
        at = end
        columns = first_block[chosen, None] + np.arange(longest)
        in_use = columns <= (positions[chosen] // layout.block_size)[:, None]
        columns = np.minimum(columns, ragged.tables.shape[1] - 1)
        blocks = np.where(in_use, ragged.tables[which[chosen, None], columns], 0).astype(np.int64)
        heads = np.arange(layout.kv_heads)[:, None]
        index = blocks[:, None, :] * layout.kv_heads + heads
        keys = first_block[chosen, None] * layout.block_size + np.arange(longest * layout.block_size)
        seen = (keys <= positions[chosen, None]) & (keys >= lowest[chosen, None])
        bias = torch.zeros(seen.shape, dtype=layout.dtype).masked_fill_(torch.from_numpy(~seen), -math.inf)
        groups.append(
            SingleTokens(
                torch.from_numpy(ragged.starts[which[chosen]]),
                torch.from_numpy(index.reshape(-1)),
                bias[:, None, None, :],
                longest,
            )
        )
    return groups


def _make_chunk(ragged: Ragged, i: int, layout: Layout, window: int | None) -> Chunk:
    computed, count = int(ragged.computed[i]), int(ragged.counts[i])
    lowest = 0 if window is None else max(computed - window + 1, 0)
    first_block = lowest // layout.block_size
    last_block = (computed + count - 1) // layout.block_size
    blocks = ragged.tables[i, first_block : last_block + 1].astype(np.int64)
    index = blocks[None, :] * layout.kv_heads + np.arange(layout.kv_heads)[:, None]
    offset = first_block * layout.block_size
    tiles = []
    for first in range(0, count, TILE):
        last = min(first + TILE, count)
        low, lower = 0, None
        if window is not None:
            low = max(computed + first - window + 1, 0)
            hidden = computed + np.arange(first, last) - window + 1 - low  # keys that each query's window excludes
            edge = int(hidden[-1])
            if edge > 0:
                excluded = np.arange(edge) < hidden[:, None]
                lower = torch.zeros(excluded.shape, dtype=layout.dtype)
                lower.masked_fill_(torch.from_numpy(excluded), -math.inf)
                lower = lower[:, None, :]
        tiles.append(Tile(first, last, max(low - offset, 0), computed + last - offset, lower))
    return Chunk(int(ragged.starts[i]), torch.from_numpy(index.reshape(-1)), len(blocks), tuple(tiles))


def _make_span(ragged: Ragged, span: Span, layout: Layout, window: int | None) -> Iterator[SpanQueries]:
    """The queries of a span that the step computes, TILE at a time. A window excludes keys before a query only."""
    computed, count = int(ragged.computed[span.row]), int(ragged.counts[span.row])
    queries = span.positions[(span.positions >= computed) & (span.positions < computed + count)]
    num_blocks = (computed + count - 1) // layout.block_size + 1
    blocks = ragged.tables[span.row, :num_blocks].astype(np.int64)
    index = blocks[None, :] * layout.kv_heads + np.arange(layout.kv_heads)[:, None]
    keys = np.arange(num_blocks * layout.block_size)
    within = np.isin(keys, span.positions)
    for first in range(0, len(queries), TILE):
        some = queries[first : first + TILE, None]
        seen = (keys <= some) | within
        if window is not None:
            seen &= keys > some - window
        bias = torch.zeros(seen.shape, dtype=layout.dtype).masked_fill_(torch.from_numpy(~seen), -math.inf)
        tokens = torch.from_numpy(some[:, 0] - computed + ragged.starts[span.row])
        yield SpanQueries(tokens, torch.from_numpy(index.reshape(-1)), num_blocks, bias[:, None, :])


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer turns products of queries and keys into attention weights."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads]: the score of each head's attention sink

    def products(self, query: Tensor, keys: Tensor) -> Tensor:
        """Scaled and capped scores of query [batch, queries, dim] and keys [batch, dim, keys].

        baddbmm scales before it rounds the result to the dtype.
        """
        unread = query.new_empty(1, 1, 1).expand(query.shape[0], query.shape[1], keys.shape[2])
        scores = torch.baddbmm(unread, query, keys, beta=0, alpha=self.scaling)
        if self.softcap is None:
            return scores
        return scores.float().div_(self.softcap).tanh_().mul_(self.softcap)

    def weigh(self, scores: Tensor, sink_shape: tuple[int, ...]) -> Tensor:
        if self.sinks is None:
            return torch.softmax(scores, -1)
        sinks = self.sinks.float().view(sink_shape).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat((scores.float(), sinks), -1), -1)[..., :-1]


def attend(query: Tensor, keys: Tensor, values: Tensor, plan: Plan, scores: Scores, workspace: Workspace) -> Tensor:
    """Attention over the cache, which already has the keys and values of this step: [tokens, heads, head dim].

    Args:
        query: [tokens, heads, head dim].
        keys, values: [blocks, kv heads, block, head dim].
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for single in plan.singles:
        _attend_single(query, keys, values, single, scores, workspace, out)
    for chunk in plan.chunks:
        _attend_chunk(query, keys, values, chunk, scores, workspace, out)
    for span in plan.spans:
        _attend_span(query, keys, values, span, scores, workspace, out)
    return out


def _gather(cache: Tensor, index: Tensor, workspace: Workspace, which: int) -> Tensor:
    runs = cache.view(-1, cache.shape[2] * cache.shape[3])
    return torch.index_select(runs, 0, index, out=workspace.take(which, len(index), runs.shape[1]))


def _attend_single(
    query: Tensor, keys: Tensor, values: Tensor, group: SingleTokens, scores: Scores, workspace: Workspace, out: Tensor
) -> None:
    _, kv_heads, block_size, dim = keys.shape
    rows, length = len(group.tokens), group.blocks * block_size
    q = query.index_select(0, group.tokens).view(rows * kv_heads, -1, dim)
    k = _gather(keys, group.index, workspace, 0).view(rows * kv_heads, length, dim)
    v = _gather(values, group.index, workspace, 1).view(rows * kv_heads, length, dim)
    s = scores.products(q, k.transpose(-1, -2)).view(rows, kv_heads, -1, length).add_(group.bias)
    p = scores.weigh(s, (1, kv_heads, -1, 1)).to(v.dtype).view(rows * kv_heads, -1, length)
    out.index_copy_(0, group.tokens, torch.bmm(p, v).view(rows, -1, dim))


def _attend_chunk(
    query: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, scores: Scores, workspace: Workspace, out: Tensor
) -> None:
    _, kv_heads, block_size, dim = keys.shape
    length = chunk.blocks * block_size
    k = _gather(keys, chunk.index, workspace, 0).view(kv_heads, length, dim).transpose(-1, -2)
    v = _gather(values, chunk.index, workspace, 1).view(kv_heads, length, dim)
    for tile in chunk.tiles:
        count, size = tile.last - tile.first, tile.high - tile.low
        rows = slice(chunk.start + tile.first, chunk.start + tile.last)
        q = query[rows].view(count, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
        s = scores.products(q, k[:, :, tile.low : tile.high]).view(kv_heads, count, -1, size)
        s[..., size - count :].add_(workspace.future(count))
        if tile.lower is not None:
            s[..., : tile.lower.shape[-1]].add_(tile.lower)
        p = scores.weigh(s, (kv_heads, 1, -1, 1)).to(v.dtype).view(kv_heads, -1, size)
        mixed = torch.bmm(p, v[:, tile.low : tile.high]).view(kv_heads, count, -1, dim)
        out[rows].view(count, kv_heads, -1, dim).copy_(mixed.transpose(0, 1))


def _attend_span(
    query: Tensor, keys: Tensor, values: Tensor, span: SpanQueries, scores: Scores, workspace: Workspace, out: Tensor
) -> None:
    _, kv_heads, block_size, dim = keys.shape
    count, length = len(span.tokens), span.blocks * block_size
    k = _gather(keys, span.index, workspace, 0).view(kv_heads, length, dim).transpose(-1, -2)
    v = _gather(values, span.index, workspace, 1).view(kv_heads, length, dim)
    q = query.index_select(0, span.tokens).view(count, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads, -1, dim)
    s = scores.products(q, k).view(kv_heads, count, -1, length).add_(span.bias)
    p = scores.weigh(s, (kv_heads, 1, -1, 1)).to(v.dtype).view(kv_heads, -1, length)
    mixed = torch.bmm(p, v).view(kv_heads, count, -1, dim).transpose(0, 1)
    out.index_copy_(0, span.tokens, mixed.reshape(count, -1, dim))
