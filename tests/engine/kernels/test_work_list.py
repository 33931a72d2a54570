"""Work lists by their properties: what must be seen is covered once, places are disjoint, capacities hold."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.arrays import Int32s
from engine.kernels.work_list import Tiling, Tilings, WorkList, capacity, plan_work


@dataclass(frozen=True)
class Case:
    rows: tuple[tuple[int, int], ...]  # (tokens before the step, tokens in the step)
    tilings: Tilings
    window: int | None
    spans: bool

    @property
    def counts(self) -> np.ndarray:
        return np.array([count for _, count in self.rows], dtype=np.int64)

    @property
    def num_computed(self) -> np.ndarray:
        return np.array([before for before, _ in self.rows], dtype=np.int64)

    @property
    def ends(self) -> np.ndarray | None:
        """Each third token of a chunk sees up to the end of its row."""
        if not self.spans:
            return None
        positions = [np.arange(before, before + count) + 1 for before, count in self.rows]
        for ends in positions:
            ends[::3] = ends[-1:]
        return np.concatenate(positions)

    def plan(self) -> WorkList:
        return plan_work(self.counts, self.num_computed, self.tilings, self.window, self.ends)


@st.composite
def tilings(draw: st.DrawFn) -> Tilings:
    queries = draw(st.sampled_from([1, 4, 16]))
    keys = draw(st.sampled_from([4, 8]))
    decode = Tiling(queries, keys, draw(st.integers(1, 9)), keys * draw(st.integers(1, 3)))
    prefill = Tiling(queries * draw(st.sampled_from([1, 2, 8])), keys, draw(st.integers(1, 5)), keys * 2)
    return Tilings(decode, prefill)


cases = st.builds(
    Case,
    rows=st.lists(
        st.tuples(st.one_of(st.integers(0, 40), st.integers(0, 600)), st.one_of(st.integers(0, 5), st.integers(0, 90))),
        min_size=1,
        max_size=9,
    ).map(tuple),
    tilings=tilings(),
    window=st.one_of(st.none(), st.integers(1, 100)),
    spans=st.booleans(),
)


def covered(items: Int32s, case: Case, queries: int) -> Counter[tuple[int, int, int]]:
    """How often each (row, query, key) lies in an item."""
    found: Counter[tuple[int, int, int]] = Counter()
    for row, first, low, high, _, _ in items.tolist():
        for query in range(first, min(first + queries, case.rows[row][1])):
            found.update((row, query, key) for key in range(low, high))
    return found


@settings(deadline=None, max_examples=60)
@given(cases)
def test_every_visible_key_is_covered_once(case: Case) -> None:
    work = case.plan()
    found = covered(work.decode, case, case.tilings.decode.queries)
    found += covered(work.prefill, case, case.tilings.prefill.queries)
    starts = np.cumsum(case.counts) - case.counts
    visible = set()
    for row, (before, count) in enumerate(case.rows):
        for query in range(count):
            end = before + query + 1 if case.ends is None else int(case.ends[starts[row] + query])
            low = 0 if case.window is None else max(before + query + 1 - case.window, 0)
            visible |= {(row, query, key) for key in range(low, end)}
    assert visible <= found.keys()
    assert set(found.values()) <= {1}
    assert all(key < sum(case.rows[row]) for row, _, key in found)


@settings(deadline=None, max_examples=100)
@given(cases)
def test_no_item_has_keys_that_none_of_its_queries_sees(case: Case) -> None:
    work = case.plan()
    for items in (work.decode, work.prefill):
        for row, first, low, high, _, _ in items.tolist():
            lowest = 0 if case.window is None else case.rows[row][0] + first + 1 - case.window
            assert max(lowest, 0) <= low < high <= sum(case.rows[row])


@settings(deadline=None, max_examples=100)
@given(cases)
def test_places_are_disjoint_and_merges_name_them(case: Case) -> None:
    work = case.plan()
    written: list[tuple[int, int, int]] = []  # row, first query of decode.queries queries, place
    step = case.tilings.decode.queries
    for items, queries in ((work.decode, step), (work.prefill, case.tilings.prefill.queries)):
        for row, first, _, _, place, _ in items.tolist():
            if place >= 0:
                written += [(row, first + i * step, place + i) for i in range(queries // step)]
    assert len({place for _, _, place in written}) == len(written)
    live = [(row, first, place) for row, first, place in written if first < case.rows[row][1]]
    merged = [
        (row, first, place + part * stride)
        for row, first, place, parts, stride in work.merges.tolist()
        for part in range(parts)
    ]
    assert sorted(merged) == sorted(live)
    assert (work.merges[:, 3] > 1).all()
    assert max((place for _, _, place in written), default=-1) < len(written)


@settings(deadline=None, max_examples=100)
@given(cases)
def test_a_tile_has_one_part_that_no_other_is_before(case: Case) -> None:
    work = case.plan()
    for items in (work.decode, work.prefill):
        lowest: dict[tuple[int, int], int] = {}
        for row, first, low, _, _, _ in items.tolist():
            lowest[row, first] = min(low, lowest.get((row, first), low))
        for row, first, low, _, _, foremost in items.tolist():
            assert foremost == (low == lowest[row, first])


@settings(deadline=None, max_examples=100)
@given(cases)
def test_parts_are_multiples_of_the_tile_and_none_but_the_last_is_short(case: Case) -> None:
    work = case.plan()
    for items, tiling in ((work.decode, case.tilings.decode), (work.prefill, case.tilings.prefill)):
        ends: dict[tuple[int, int], int] = {}
        for row, first, _, high, _, _ in items.tolist():
            ends[row, first] = max(high, ends.get((row, first), 0))
        for row, first, low, high, place, _ in items.tolist():
            if place >= 0 and high < ends[row, first]:
                assert (high - low) % tiling.keys == 0
                assert high - low >= tiling.min_part


@settings(deadline=None, max_examples=100)
@given(cases)
def test_capacity_holds_for_every_batch(case: Case) -> None:
    work = case.plan()
    limit = capacity(case.tilings, len(case.rows), int(case.counts.sum()))
    assert work.sizes.tolist() == [len(work.decode), len(work.prefill), len(work.merges)]
    assert len(work.decode) <= limit.decode
    assert len(work.prefill) <= limit.prefill
    assert len(work.merges) <= limit.merges
    per_tile = case.tilings.places_per_prefill_tile
    highest = max(int(work.decode[:, 4].max(initial=-1)), int(work.prefill[:, 4].max(initial=-1)) + per_tile - 1)
    assert highest < limit.places


H100 = Tilings(Tiling(4, 64, 50), Tiling(32, 64, 17, 1024))


@pytest.mark.parametrize(
    ("rows", "keys", "parts"), [(1, 8192, 32), (64, 4096, 4), (128, 1024, 1), (256, 1500, 1), (8, 300, 1)]
)
def test_rows_that_decode_are_split_to_fill_the_device(rows: int, keys: int, parts: int) -> None:
    work = plan_work(np.ones(rows, np.int64), np.full(rows, keys - 1), H100)
    assert work.sizes.tolist() == [rows * parts, 0, rows if parts > 1 else 0]


def test_a_long_prompt_is_not_split_and_a_short_chunk_after_a_long_context_is() -> None:
    prompt = plan_work(np.array([2048]), np.array([0]), H100)
    assert prompt.sizes.tolist()[0] == 0
    assert 64 <= len(prompt.prefill) < 80
    chunk = plan_work(np.array([64]), np.array([100_000]), H100)
    assert len(chunk.prefill) > 2 * H100.prefill.programs
    assert len(chunk.merges) == 64 // H100.decode.queries


def test_programs_get_about_the_same_number_of_keys() -> None:
    work = plan_work(np.array([2048]), np.array([0]), H100)
    keys = work.prefill[:, 3] - work.prefill[:, 2]
    loads = [int(keys[program :: H100.prefill.programs].sum()) for program in range(H100.prefill.programs)]
    assert max(loads) < 1.1 * np.mean(loads)


def test_an_empty_batch_has_no_work() -> None:
    work = plan_work(np.zeros(3, np.int64), np.array([5, 0, 9]), H100)
    assert work.sizes.tolist() == [0, 0, 0]


def test_tilings_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of decode tiles of 3"):
        Tilings(replace(H100.decode, queries=3), H100.prefill)
    with pytest.raises(ValueError, match="aren't multiples of 64 keys"):
        Tiling(4, 64, 50, 100)
