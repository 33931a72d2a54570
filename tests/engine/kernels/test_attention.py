"""The paged attention against dense attention in float64, on random ragged batches."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import attention
from engine.kernels.attention import Layout, Ragged, Scores, Span, Workspace


@dataclass(frozen=True)
class Case:
    rows: tuple[tuple[int, int], ...]  # (tokens before the step, tokens in the step)
    kv_heads: int
    group: int
    head_dim: int
    block_size: int
    window: int | None
    softcap: float | None
    sinks: bool
    seed: int


cases = st.builds(
    Case,
    rows=st.lists(
        st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 150))), min_size=1, max_size=6
    ).map(tuple),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8]),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.one_of(st.none(), st.integers(1, 100)),
    softcap=st.one_of(st.none(), st.floats(0.5, 30)),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    case: Case,
    sinks: torch.Tensor | None,
    span: np.ndarray | None = None,
) -> torch.Tensor:
    """q [n, heads, dim] are the last n of the tokens of k, v [tokens, kv heads, dim]; all in float64.

    Positions of `span` see each other.
    """
    n, total = len(q), len(k)
    k, v = k.repeat_interleave(case.group, 1), v.repeat_interleave(case.group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * 0.3
    if case.softcap is not None:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    at, keys = torch.arange(total - n, total)[:, None], torch.arange(total)[None]
    hidden = keys > at
    if span is not None:
        hidden &= ~(torch.isin(at, torch.from_numpy(span)) & torch.isin(keys, torch.from_numpy(span)))
    if case.window is not None:
        hidden |= keys <= at - case.window
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, n, 1)), -1)
    weights = torch.softmax(scores, -1)[..., :total]
    return torch.einsum("hqk,khd->qhd", weights, v)


class Setup:
    """A cache whose blocks are dealt at random and hold stale numbers where nothing was written."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32):
        torch.manual_seed(case.seed)
        self.layout = Layout(case.block_size, case.kv_heads, case.head_dim, dtype)
        totals = [before + count for before, count in case.rows]
        needed = [-(-total // case.block_size) for total in totals]
        deal = np.random.default_rng(case.seed).permutation(sum(needed)) + 1
        tables = np.full((len(totals), max(needed)), 0, dtype=np.int32)
        for i, end in enumerate(np.cumsum(needed)):
            tables[i, : needed[i]] = deal[end - needed[i] : end]
        shape = (sum(needed) + 1, case.kv_heads, case.block_size, case.head_dim)
        self.keys, self.values = torch.full(shape, 9.0, dtype=dtype), torch.full(shape, 9.0, dtype=dtype)
        self.k = [torch.randn(total, case.kv_heads, case.head_dim).to(dtype) for total in totals]
        self.v = [torch.randn(total, case.kv_heads, case.head_dim).to(dtype) for total in totals]
        heads = case.kv_heads * case.group
        self.q = [torch.randn(count, heads, case.head_dim).to(dtype) for _, count in case.rows]
        self.sinks = torch.randn(heads) if case.sinks else None
        counts = np.array([count for _, count in case.rows], dtype=np.int64)
        computed = np.array([before for before, _ in case.rows], dtype=np.int64)
        self.ragged = Ragged(np.cumsum(counts) - counts, counts, computed, tables)
        for i, total in enumerate(totals):
            rows = np.full(total, i, dtype=np.int64)
            index = attention.write_index(tables, rows, np.arange(total), self.layout)
            attention.write(self.keys, index, self.k[i])
            attention.write(self.values, index, self.v[i])

    def attend(self, case: Case) -> torch.Tensor:
        plan = attention.make_plan(self.ragged, self.layout, case.window)
        scores = Scores(0.3, case.softcap, self.sinks)
        workspace = Workspace(self.layout.dtype)
        return attention.attend(torch.cat(self.q), self.keys, self.values, plan, scores, workspace)

    def expected(self, case: Case) -> torch.Tensor:
        parts = zip(self.q, self.k, self.v, strict=True)
        return torch.cat([dense(q.double(), k.double(), v.double(), case, self.sinks) for q, k, v in parts])


@settings(deadline=None, max_examples=120)
@given(cases)
def test_equals_dense_attention(case: Case) -> None:
    setup = Setup(case)
    torch.testing.assert_close(setup.attend(case).double(), setup.expected(case), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(cases, st.data())
def test_tokens_of_a_span_see_each_other(case: Case, data: st.DataObject) -> None:
    """A span is in any row, with gaps, and may begin before the step: after a prefix hit."""
    setup = Setup(case)
    row = data.draw(st.integers(0, len(case.rows) - 1))
    total = sum(case.rows[row])
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1, max_size=40))), dtype=np.int64)
    plan = attention.make_plan(setup.ragged, setup.layout, case.window, [Span(row, positions)])
    scores, workspace = Scores(0.3, case.softcap, setup.sinks), Workspace(setup.layout.dtype)
    found = attention.attend(torch.cat(setup.q), setup.keys, setup.values, plan, scores, workspace)
    expected = [
        dense(q.double(), k.double(), v.double(), case, setup.sinks, positions if i == row else None)
        for i, (q, k, v) in enumerate(zip(setup.q, setup.k, setup.v, strict=True))
    ]
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype: torch.dtype) -> None:
    case = Case(((0, 70), (33, 1), (80, 1), (5, 1), (20, 30)), 2, 3, 8, 16, None, None, False, 1)
    setup = Setup(case, dtype)
    torch.testing.assert_close(setup.attend(case).double(), setup.expected(case), rtol=0.03, atol=0.03)


@settings(deadline=None, max_examples=60)
@given(cases)
def test_a_plan_covers_every_token_once_and_never_reads_past_a_row(case: Case) -> None:
    setup = Setup(case)
    plan = attention.make_plan(setup.ragged, setup.layout, case.window)
    tokens = [token for group in plan.singles for token in group.tokens.tolist()]
    for chunk in plan.chunks:
        assert chunk.tiles[0].first == 0
        for tile in chunk.tiles:
            tokens += range(chunk.start + tile.first, chunk.start + tile.last)
            assert 0 <= tile.low < tile.high <= chunk.blocks * case.block_size
    assert sorted(tokens) == list(range(int(setup.ragged.counts.sum())))


def test_rows_of_unlike_length_are_not_padded_to_the_longest() -> None:
    lengths = np.array([4000] + [64] * 40, dtype=np.int64)
    tables = np.ones((41, 126), dtype=np.int32)
    ragged = Ragged(np.arange(41), np.ones(41, dtype=np.int64), lengths, tables)
    plan = attention.make_plan(ragged, Layout(32, 2, 8, torch.float32))
    assert [(len(group.tokens), group.blocks) for group in plan.singles] == [(1, 126), (40, 3)]


def test_groups_are_bounded() -> None:
    rows = 64
    tables = np.ones((rows, 257), dtype=np.int32)
    ragged = Ragged(np.arange(rows), np.ones(rows, dtype=np.int64), np.full(rows, 8191), tables)
    layout = Layout(32, 8, 128, torch.bfloat16)
    for group in attention.make_plan(ragged, layout).singles:
        run_bytes = layout.block_size * layout.head_dim * 2
        assert len(group.index) * run_bytes <= attention.GROUP_BYTES
