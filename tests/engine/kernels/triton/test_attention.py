"""Paged attention in Triton against dense attention in float64, and against the attention of the generic backend."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels import attention as reference
from engine.kernels.triton.attention import Partials, Work, paged_attention
from engine.kernels.triton.kv_storage import LayerCache
from engine.kernels.work_list import Tilings, capacity
from tests.engine.kernels.triton.attention_case import SCALING, Case, Setup, device_work

MIXED = ((0, 5), (10, 1), (33, 1), (7, 20), (0, 1), (3, 0), (50, 2))
# of the results: rounding of the operands and of the output; the interpreter cuts off where it stores bfloat16
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}

cases = st.builds(
    Case,
    rows=st.lists(st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(0, 40))), min_size=1, max_size=5).map(
        tuple
    ),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 2, 3, 7, 16, 20]),
    head_dim=st.sampled_from([4, 16, 24]),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.one_of(st.none(), st.integers(1, 80)),
    softcap=st.one_of(st.none(), st.floats(0.5, 30)),
    sinks=st.booleans(),
    spans=st.booleans(),
    slots=st.booleans(),
    shared=st.integers(0, 4),
    keys_per_tile=st.sampled_from([8, 16]),
    min_part=st.sampled_from([16, 32]),
    programs=st.integers(1, 3),
    prefill_tiles=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    cache_dtype=st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn, torch.uint8]),
    seed=st.integers(0, 1000),
).filter(lambda case: any(count for _, count in case.rows))


@settings(settings.get_profile("triton"))
@given(cases)
def test_equals_dense_attention(case: Case) -> None:
    Setup(case).check(TOLERANCE[case.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_batch_of_each_dtype(dtype: torch.dtype) -> None:
    Setup(Case(MIXED, dtype=dtype)).check(TOLERANCE[dtype])


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_mixed_batch_with_a_cache_in_8_bits(cache_dtype: torch.dtype) -> None:
    Setup(Case(MIXED, cache_dtype=cache_dtype, block_size=8)).check(2e-5)


def test_windows_softcap_sinks_and_spans_together() -> None:
    """With a window the first part of a row doesn't begin at key 0, and has the sink all the same."""
    Setup(Case(MIXED, window=20, softcap=2.0, sinks=True, spans=True, slots=True)).check(2e-5)


def test_sinks_count_once_where_keys_are_split() -> None:
    setup = Setup(Case(((60, 1), (90, 1)), sinks=True, programs=3))
    assert setup.plan().sizes[2] == 2
    setup.check(2e-5)


BORDERS = ((15, 1), (16, 1), (17, 1), (0, 15), (0, 16), (0, 17), (31, 2), (16, 16), (32, 0))


@pytest.mark.parametrize("window", [None, 15, 16, 17])
def test_rows_that_end_at_borders_of_blocks_and_tiles(window: int | None) -> None:
    Setup(Case(BORDERS, kv_heads=1, block_size=16, keys_per_tile=16, min_part=16, window=window)).check(2e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("group", [1, 2, 4, 5, 6, 7, 8, 12, 16, 32, 64, 71])
def test_heads_that_share_a_kv_head(group: int) -> None:
    Setup(Case(((0, 9), (33, 1), (20, 3)), kv_heads=1, group=group, sinks=True)).check(2e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [
        (torch.float32, None),
        (torch.float16, None),
        (torch.bfloat16, None),
        (torch.float32, torch.int8),
        (torch.float32, torch.float8_e4m3fn),
        (torch.float32, torch.uint8),
        (torch.bfloat16, torch.int8),
        (torch.bfloat16, torch.uint8),
    ],
)
def test_head_dims(head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    case = Case(
        ((0, 37), (90, 1), (41, 3)),
        head_dim=head_dim,
        kv_heads=1,
        group=4,
        block_size=32,
        keys_per_tile=32,
        min_part=32,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    Setup(case).check(max(5e-5, TOLERANCE[dtype]))


def test_rows_with_blocks_in_common_read_them_where_they_are() -> None:
    setup = Setup(Case(((24, 1), (24, 9), (19, 1)), shared=4))
    assert (setup.tables[0, :4] == setup.tables[1, :4]).all()
    setup.check(2e-5)


def test_an_empty_batch_writes_nothing() -> None:
    setup = Setup(Case(((3, 0), (0, 0))))
    assert (setup.attend() == 7.0).all()


def test_the_order_of_items_does_not_matter() -> None:
    """Each item writes to its own place, so results have the same bits in any order."""
    setup = Setup(Case(MIXED, sinks=True, window=30))
    plan = setup.plan()
    shuffled = [np.random.default_rng(0).permutation(items) for items in (plan.decode, plan.prefill, plan.merges)]
    work = Work(torch.from_numpy(plan.sizes), *map(torch.from_numpy, shuffled))
    assert torch.equal(setup.attend(), setup.attend(work))


def test_launches_without_items_may_be_left_out() -> None:
    setup = Setup(Case(((10, 1), (20, 1)), min_part=64))
    plan = setup.plan()
    assert plan.sizes.tolist() == [2, 0, 0]
    setup.check(2e-5, Work(torch.from_numpy(plan.sizes), torch.from_numpy(plan.decode), None, None))


def test_equals_the_attention_of_the_generic_backend() -> None:
    case = Case(MIXED, window=25, softcap=3.0)
    setup = Setup(case)
    layout = reference.Layout(case.block_size, case.kv_heads, case.head_dim, case.dtype)
    rows = np.flatnonzero(setup.counts)
    ragged = reference.Ragged(setup.starts[rows], setup.counts[rows], setup.num_computed[rows], setup.tables[rows])
    tokens = int(setup.counts.sum())
    expected = reference.attend(
        setup.query[:tokens], setup.cache.keys.nan_to_num(0.0), setup.cache.values.nan_to_num(0.0),
        reference.make_plan(ragged, layout, case.window), reference.Scores(SCALING, case.softcap),
        reference.Workspace(case.dtype),
    )  # fmt: skip
    torch.testing.assert_close(setup.attend()[:tokens], expected, rtol=2e-5, atol=2e-5)


def test_queries_may_lie_in_the_output_of_the_qkv_projection() -> None:
    setup = Setup(Case(MIXED))
    tokens, heads, dim = setup.query.shape
    qkv = torch.full((tokens, heads + 4, dim), float("nan"))
    qkv[:, :heads] = setup.query
    setup.query = qkv[:, :heads]
    setup.check(2e-5)


def test_wrong_layouts_are_refused() -> None:
    case = Case(((4, 1),))
    setup = Setup(case)
    work, rows = device_work(setup.plan()), setup.device_rows()
    partials = Partials.allocate(case.shape, capacity(case.tilings, 1, 1), "cpu")

    def run(query: torch.Tensor, tilings: Tilings = case.tilings) -> None:
        paged_attention(
            query, setup.cache, torch.empty_like(query), rows, work, case.shape, tilings, case.scores, partials
        )

    with pytest.raises(ValueError, match="side by side"):
        run(setup.query.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="the shape needs 8"):
        run(setup.query, Tilings(replace(case.tilings.decode, queries=4), case.tilings.prefill))
    with pytest.raises(RuntimeError, match="different devices"):
        run(setup.query.to("meta"))
    with pytest.raises(ValueError, match="contiguous"):
        LayerCache(setup.cache.keys.transpose(1, 2), setup.cache.values)
    with pytest.raises(ValueError, match="has scales if and only if"):
        LayerCache(setup.cache.keys.to(torch.int8), setup.cache.values.to(torch.int8))
