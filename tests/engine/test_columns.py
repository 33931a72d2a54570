"""Packed tables are what they were."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engine.columns import pack_table, unpack_table

shapes = st.tuples(st.integers(2, 40), st.integers(1, 4))
ranges = st.sampled_from([(0, 0), (-3, 90), (0, 30_000), (-(1 << 31), (1 << 31) - 1)])


@given(shapes.flatmap(lambda shape: ranges.flatmap(lambda few: arrays(np.int32, shape, elements=st.integers(*few)))))
def test_tables_come_back(table: np.ndarray) -> None:
    assert np.array_equal(unpack_table(pack_table(table), *table.shape), table)


def test_rows_that_follow_each_other_cost_nothing() -> None:
    rows = np.arange(256)
    blocks = np.random.default_rng(1).permutation(20_000)[:256]
    packed = pack_table(np.stack([rows, 0 * rows, blocks], axis=1).astype(np.int32))
    assert len(packed) == 3 * 5 + 1 + 1 + 2 * 255
