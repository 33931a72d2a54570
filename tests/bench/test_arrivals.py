"""Arrival times: seeded, sorted, exact in their mean rate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.arrivals import KINDS, arrival_times, point_seed
from bench.errors import BenchError

rates = st.floats(0.05, 500)
durations = st.floats(0.1, 60)
seeds = st.integers(0, 2**32 - 1)


@given(rates, durations, seeds, st.sampled_from(KINDS), st.floats(0.2, 5))
def test_shape_of_a_schedule(rate: float, duration: float, seed: int, kind: str, burstiness: float) -> None:
    times = arrival_times(rate, duration, seed, kind, burstiness)
    count = max(1, round(rate * duration))
    assert len(times) == count
    assert times[0] == 0
    assert np.all(np.diff(times) >= 0)
    assert times[-1] <= count / rate * (1 + 1e-9)
    assert np.array_equal(times, arrival_times(rate, duration, seed, kind, burstiness))


def test_constant_gaps_are_the_inverse_of_the_rate() -> None:
    assert arrival_times(4, 2, 1, "constant") == pytest.approx(np.arange(8) / 4)


@pytest.mark.parametrize(
    ("kind", "burstiness", "variation"),
    [("poisson", 1.0, 1.0), ("gamma", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4, 0.5)],
)
def test_gaps_vary_as_their_kind_says(kind: str, burstiness: float, variation: float) -> None:
    gaps = np.diff(arrival_times(50, 400, 3, kind, burstiness))
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.1)


def test_seeds_differ() -> None:
    assert not np.array_equal(arrival_times(5, 10, 1), arrival_times(5, 10, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 10, 1), "--rate"),
        ((float("inf"), 10, 1), "--rate"),
        ((1, 0, 1), "duration"),
        ((1, 10, 1, "gamma", 0), "burstiness"),
        ((1, 10, 1, "gamma", 1e-9), "burstiness"),
        ((1, 10, 1, "uniform"), "poisson, constant, gamma"),
    ],
)
def test_bad_input_is_named(arguments: tuple, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        arrival_times(*arguments)


def test_point_seed_is_the_same_everywhere() -> None:
    assert point_seed(0, "500/2000", 4.2) == 674636037


def test_point_seeds_differ_by_each_part() -> None:
    seeds = {
        point_seed(0, "500/2000", 4.2),
        point_seed(1, "500/2000", 4.2),
        point_seed(0, "2048/128", 4.2),
        point_seed(0, "500/2000", 4.3),
        point_seed(0, "500/2000", 4.2, repeat=1),
    }
    assert len(seeds) == 5
    assert point_seed(0, "500/2000", 4.2) == point_seed(0, "500/2000", 4.2 + 1e-12)
