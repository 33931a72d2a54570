"""Padded steps: every step has a size that holds it, and padding keeps its arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.work_list import Tiling, Tilings, capacity, plan_work
from engine.worker.slots import StepBatch
from engine.worker.step_sizes import Padding, StepSize, StepSizes, pad_arrays


def batch(counts: list[int], num_drafts: int = 0, num_scored: int = 0) -> StepBatch:
    """A batch of which every row samples."""
    of_rows = np.array(counts, dtype=np.int64)
    tokens = np.zeros(int(of_rows.sum()), dtype=np.int64)
    drafts = np.full(len(counts), num_drafts)
    sampled = np.zeros(len(counts) * (1 + num_drafts), dtype=np.int64)
    scored = np.zeros(num_scored, dtype=np.int64)
    tables = np.zeros((1, len(counts), 1), dtype=np.int32)
    return StepBatch(
        0, of_rows, of_rows, of_rows, of_rows, tables, tokens, tokens, tokens, None, of_rows, drafts, sampled, scored
    )


def test_sizes_of_a_small_and_a_large_engine() -> None:
    small = [(size.tokens, size.rows, size.mixed) for size in StepSizes(6, 40).in_capture_order]
    assert small == [
        (40, 6, True), (6, 6, False), (4, 4, False), (2, 2, False), (1, 1, False), (32, 6, True), (16, 6, True),
    ]  # fmt: skip
    large = StepSizes(256, 2048).in_capture_order
    mixed = sorted(size.tokens for size in large if size.mixed)
    assert mixed == [16, 32, 64, 128, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    assert [size.tokens for size in reversed(large) if not size.mixed] == [1, 2, 4, *range(8, 257, 8)]
    assert large[0] == StepSize(2048, 256, True)


@given(st.integers(1, 700), st.integers(0, 5000), st.data())
def test_the_smallest_size_that_holds_a_step(rows: int, more: int, data: st.DataObject) -> None:
    sizes = StepSizes(rows, rows + more)
    counts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=rows))
    found, mixed = sizes.find(batch(counts)), max(counts) > 1
    holds = [one for one in sizes.in_capture_order if one.mixed == mixed and one.tokens >= sum(counts)]
    holds.sort(key=lambda one: -one.tokens)
    if sum(counts) > rows + more:
        assert found is None
        return
    assert found == holds[-1]
    assert len(counts) <= found.rows <= found.tokens


def test_steps_that_have_no_size() -> None:
    sizes = StepSizes(4, 16)
    assert sizes.find(batch([1, 1])) == StepSize(2, 2, False)
    assert sizes.find(batch([1, 3])) == StepSize(16, 4, True)
    assert sizes.find(batch([1, 1], num_drafts=1)) is None
    assert sizes.find(batch([1, 1], num_scored=1)) is None
    assert sizes.find(batch([1, 16])) is None


def test_padding() -> None:
    layout = {"a": Padding(3, -1), "b": Padding(2, columns=2), "c": Padding(2)}
    arrays = {"c": np.array([7], dtype=np.int64), "a": np.array([5], dtype=np.int32)}
    padded = pad_arrays(arrays, layout)
    assert padded is not None
    assert {name: array.tolist() for name, array in padded.items()} == {
        "a": [5, -1, -1], "b": [[0, 0], [0, 0]], "c": [7, 0],
    }  # fmt: skip
    assert list(padded) == ["a", "b", "c"]
    assert padded["c"].dtype == np.int64
    assert pad_arrays(arrays, {"a": Padding(3)}) is None
    with pytest.raises(ValueError, match="c has 1 entries, more than 0"):
        pad_arrays(arrays, layout | {"c": Padding(0)})


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3000)), min_size=1, max_size=12), st.booleans())
def test_work_lists_fit_their_padding(rows: list[tuple[int, int]], windowed: bool) -> None:
    tilings = Tilings(Tiling(2, 64, 3), Tiling(8, 64, 2))
    counts = np.array([count for count, _ in rows])
    work = plan_work(counts, np.array([computed for _, computed in rows]), tilings, 100 if windowed else None)
    size = StepSizes(12, 1000).find(batch(counts.tolist()))
    assert size is not None
    most = capacity(tilings, size.rows, size.tokens)
    assert len(work.decode) <= most.decode
    assert len(work.prefill) <= (most.prefill if size.mixed else 0)
    assert len(work.merges) <= most.merges
