"""A ragged batch over a paged cache for tests of attention kernels, and dense attention in float64 to compare with."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from engine.kernels.triton.attention import AttentionShape, Partials, Rows, Scores, Work, paged_attention
from engine.kernels.triton.kv_storage import EIGHT_BITS, LayerCache
from engine.kernels.triton.tiles import tilings
from engine.kernels.work_list import Tiling, Tilings, WorkList, capacity, plan_work

SCALING = 0.3
PADDING = 3  # tokens and rows of the padded batch beyond the real ones
UNTOUCHED = 7.0


@dataclass(frozen=True)
class Case:
    """rows: (tokens before the step, tokens in the step) of each. shared: how many leading blocks all rows have in
    common, as far as their lengths allow. target: whose tiles are taken, see `engine.kernels.triton.tiles`; empty: the
    small ones below."""

    rows: tuple[tuple[int, int], ...]
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    block_size: int = 4
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    spans: bool = False
    slots: bool = False
    shared: int = 0
    keys_per_tile: int = 8
    min_part: int = 8
    programs: int = 2
    prefill_tiles: int = 2
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    seed: int = 0
    target: str = ""
    shape: AttentionShape = field(init=False)
    tilings: Tilings = field(init=False)

    def __post_init__(self) -> None:
        shape = AttentionShape(self.kv_heads * self.group, self.kv_heads, self.head_dim, self.block_size)
        decode = Tiling(shape.decode_queries, self.keys_per_tile, self.programs, self.min_part)
        prefill = Tiling(self.prefill_tiles * decode.queries, self.keys_per_tile, self.programs, self.min_part)
        object.__setattr__(self, "shape", shape)
        made = Tilings(decode, prefill)
        if self.target:
            quantized = self.cache_dtype in EIGHT_BITS
            made = tilings(shape, self.dtype.itemsize, self.target, self.programs * self.kv_heads, quantized)
        object.__setattr__(self, "tilings", made)

    @property
    def scores(self) -> Scores:
        heads = self.shape.heads
        sinks = torch.randn(heads, generator=torch.Generator().manual_seed(self.seed)) if self.sinks else None
        return Scores(SCALING, self.window, self.softcap, sinks)


def dense(q: Tensor, k: Tensor, v: Tensor, case: Case, ends: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention of q [n, heads, dim], the last n tokens of k and v [tokens, kv heads, dim], in float64."""
    n, total = len(q), len(k)
    k, v = k.repeat_interleave(case.group, 1), v.repeat_interleave(case.group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALING
    if case.softcap is not None:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    at, keys = torch.arange(total - n, total)[:, None], torch.arange(total)[None]
    hidden = keys >= ends[:, None]
    if case.window is not None:
        hidden |= keys <= at - case.window
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, n, 1)), -1)
    weights = torch.softmax(scores, -1)[..., :total]
    return torch.einsum("hqk,khd->qhd", weights, v)


class Setup:
    """A cache that is NaN wherever no visible token of the batch is stored; null block 0 and unused blocks are NaN."""

    def __init__(self, case: Case, device: torch.device | str = "cpu"):
        self.case = case
        self.device = device
        torch.manual_seed(case.seed)
        random = np.random.default_rng(case.seed)
        self.counts = np.array([count for _, count in case.rows], dtype=np.int64)
        self.num_computed = np.array([before for before, _ in case.rows], dtype=np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        totals = self.num_computed + self.counts
        self._deal_blocks(totals, random)
        shape = (self.num_blocks, case.kv_heads, case.block_size, case.head_dim)
        self.keys, self.values = (torch.full(shape, math.nan, dtype=torch.float64) for _ in range(2))
        for i, total in enumerate(totals.tolist()):
            lowest = self._lowest(i)
            for at in range(lowest, total):
                block, offset = self.tables[i, at // case.block_size], at % case.block_size
                if self.keys[block, 0, offset, 0].isnan():
                    self.keys[block, :, offset] = torch.randn(case.kv_heads, case.head_dim).double()
                    self.values[block, :, offset] = torch.randn(case.kv_heads, case.head_dim).double()
            self.tables[i, : lowest // case.block_size] = 0  # blocks before the window are given back
        tokens = int(self.counts.sum())
        self.query = torch.randn(tokens + PADDING, case.shape.heads, case.head_dim).to(case.dtype).to(device)
        self.ends = self._ends()
        self._store()

    def _lowest(self, row: int) -> int:
        before, window = self.case.rows[row][0], self.case.window
        return 0 if window is None else max(before - window + 1, 0)

    def _deal_blocks(self, totals: np.ndarray, random: np.random.Generator) -> None:
        size = self.case.block_size
        needed = -(-totals // size)
        self.num_blocks = int(needed.sum()) + 3
        deal = random.permutation(self.num_blocks - 1) + 1
        self.tables = np.zeros((len(totals), max(int(needed.max()), 1)), dtype=np.int32)
        for i, end in enumerate(np.cumsum(needed)):
            self.tables[i, : needed[i]] = deal[end - needed[i] : end]
        for i, (before, _) in enumerate(self.case.rows):
            shared = min(self.case.shared, before // size, self.case.rows[0][0] // size)
            self.tables[i, :shared] = self.tables[0, :shared]

    def _ends(self) -> np.ndarray:
        """Causal, or with spans: of each row's tokens, the second third attends to all of itself."""
        ends = []
        for before, count in self.case.rows:
            own = np.arange(before, before + count) + 1
            if self.case.spans:
                own[count // 3 : 2 * count // 3] = before + 2 * count // 3
            ends.append(own)
        return np.concatenate(ends)

    def _store(self) -> None:
        """Store the cache in its dtype; `keys` and `values` become what the stored numbers mean."""
        dtype = self.case.cache_dtype or self.case.dtype
        if dtype not in EIGHT_BITS:
            stored = [self.keys.to(dtype), self.values.to(dtype)]
            self.keys, self.values = (numbers.double() for numbers in stored)
            self.cache = LayerCache(*(numbers.to(self.device) for numbers in stored))
            return
        stored, scales = [], []
        for numbers in (self.keys, self.values):
            scale = (numbers.abs().amax(-1) / EIGHT_BITS[dtype]).float()
            scaled = (numbers / scale[..., None].double()).float()
            as_dtype = scaled.nan_to_num(77.0)
            as_dtype = as_dtype.round().to(torch.int8) if dtype == torch.int8 else as_dtype.to(torch.float8_e4m3fn)
            numbers.copy_(as_dtype.double() * scale[..., None].double())
            stored.append(as_dtype.view(dtype))
            scales.append(scale)
        self.cache = LayerCache(*(tensor.to(self.device) for tensor in (*stored, *scales)))

    def device_rows(self) -> Rows:
        """The rows on the device: padded with empty rows, and in any order of slots."""
        rows = len(self.counts)
        tables, slots = self.tables, None
        if self.case.slots:
            order = np.random.default_rng(self.case.seed).permutation(rows)
            tables = self.tables[order]
            slots = padded(np.argsort(order).astype(np.int32)).to(self.device)
        columns = [padded(column).to(self.device) for column in (self.starts, self.counts, self.num_computed)]
        ends = padded(self.ends).to(self.device) if self.case.spans else None
        return Rows(torch.from_numpy(tables).to(self.device), *columns, slots, ends)

    def plan(self) -> WorkList:
        case = self.case
        return plan_work(self.counts, self.num_computed, case.tilings, case.window, self.ends if case.spans else None)

    def attend(self, work: Work | None = None) -> Tensor:
        """The output of the padded batch."""
        case = self.case
        work = work or device_work(self.plan(), self.device)
        size = (len(self.query), case.shape.heads, case.head_dim)
        out = torch.full(size, UNTOUCHED, dtype=case.dtype, device=self.device)
        limit = capacity(case.tilings, len(self.counts), int(self.counts.sum()))
        partials = Partials.allocate(case.shape, limit, self.device)
        for buffer in (partials.sums, partials.tops, partials.weights):
            buffer.fill_(math.nan)
        scores = case.scores
        if scores.sinks is not None:
            scores = replace(scores, sinks=scores.sinks.to(self.device))
        paged_attention(
            self.query, self.cache, out, self.device_rows(), work, case.shape, case.tilings, scores, partials
        )
        return out

    def expected(self) -> Tensor:
        out, case, query = [], self.case, self.query.double().cpu()
        for i, (start, count) in enumerate(zip(self.starts.tolist(), self.counts.tolist(), strict=True)):
            total, lowest = case.rows[i][0] + count, self._lowest(i)
            at = np.arange(total)
            block, offset = self.tables[i, at // case.block_size], at % case.block_size
            k, v = self.keys[block, :, offset], self.values[block, :, offset]
            k[:lowest], v[:lowest] = 0, 0
            ends = torch.from_numpy(self.ends[start : start + count])
            out.append(dense(query[start : start + count], k, v, case, ends, case.scores.sinks))
        return torch.cat(out)

    def check(self, tolerance: float, work: Work | None = None) -> Tensor:
        """Returns what `attend` does."""
        out = self.attend(work)
        tokens = int(self.counts.sum())
        torch.testing.assert_close(out[:tokens].double().cpu(), self.expected(), rtol=tolerance, atol=tolerance)
        assert (out[tokens:] == UNTOUCHED).all()
        return out


def padded(column: np.ndarray) -> Tensor:
    """int32, with zeros for the padding."""
    return torch.from_numpy(np.concatenate((column, np.zeros(PADDING, column.dtype))).astype(np.int32))


def device_work(work: WorkList, device: torch.device | str = "cpu") -> Work:
    """Lists as on the device: longer than their items; what is beyond must not be read."""
    longer = [
        np.concatenate((items, np.full((PADDING, items.shape[1]), 1 << 20, np.int32)))
        for items in (work.decode, work.prefill, work.merges)
    ]
    return Work(*(torch.from_numpy(items).to(device) for items in (work.sizes, *longer)))
