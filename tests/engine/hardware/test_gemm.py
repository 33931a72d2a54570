"""Measured products: a table by the rows of activations."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.hardware.description import GemmTable
from engine.hardware.gemm import MeasuredProducts

TABLE = GemmTable((1, 8, 32), (50, 60, 180))


def test_products_are_interpolated_and_go_on_in_proportion_to_the_rows() -> None:
    products = MeasuredProducts(TABLE)
    weights = 1000 * 300
    times = [products.seconds(rows, 1000, 300) / weights * 1e12 for rows in (1, 4, 8, 20, 32, 64)]
    assert times == pytest.approx([50, 50 + 10 * 3 / 7, 60, 120, 180, 360])


@given(
    st.lists(st.tuples(st.integers(1, 1000), st.floats(1, 1000)), min_size=1, max_size=8, unique_by=lambda row: row[0])
)
def test_more_rows_never_take_less_time_where_they_do_not_in_the_table(rows: list[tuple[int, float]]) -> None:
    counts, each = sorted(count for count, _ in rows), sorted(value for _, value in rows)
    products = MeasuredProducts(GemmTable(tuple(counts), tuple(each)))
    times = [products.seconds(count, 64, 64) for count in range(1, 1200, 7)]
    assert all(before <= after * (1 + 1e-12) for before, after in itertools.pairwise(times))
