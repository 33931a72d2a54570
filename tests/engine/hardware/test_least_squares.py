"""Least squares with coefficients that are not negative."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.hardware.least_squares import nonnegative_least_squares

seeds, sizes = st.integers(0, 2**32 - 1), st.integers(1, 12)


@given(seed=seeds, columns=sizes, zeros=st.integers(0, 12))
def test_known_coefficients_are_found_whatever_their_units(seed: int, columns: int, zeros: int) -> None:
    random = np.random.default_rng(seed)
    matrix = random.random((columns + 10, columns))
    known = random.random(columns) + 0.1
    known[:zeros] = 0
    units = 10.0 ** random.integers(-12, 3, columns)
    found = nonnegative_least_squares(matrix * units, matrix @ known)
    assert np.allclose(found * units, known, atol=1e-6)


@given(seed=seeds, columns=sizes)
def test_no_change_of_a_coefficient_comes_closer(seed: int, columns: int) -> None:
    random = np.random.default_rng(seed)
    matrix, values = random.normal(size=(columns + 5, columns)), random.normal(size=columns + 5)
    found = nonnegative_least_squares(matrix, values)
    gradient = matrix.T @ (values - matrix @ found)
    assert (found >= 0).all()
    assert np.allclose(gradient[found > 0], 0, atol=1e-7)
    assert (gradient <= 1e-7).all()
