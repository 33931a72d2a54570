import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.statistics.intervals import effective_samples, joined_gaps, percentile, percentile_interval, step_indices
from tests.bench.step_model import streams, true_percentile


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from([50, 90, 99]))
def test_interval_lies_around_the_percentile(samples: list[float], q: float) -> None:
    values = np.array(samples)
    low, high = percentile_interval(values, q)
    assert low == -math.inf or values.min() <= low <= values.max()
    assert high == math.inf or values.min() <= high <= values.max()
    assert low <= np.percentile(values, q, method="inverted_cdf") <= high


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth = -math.log(0.01)
    covered = 0
    for _ in range(400):
        low, high = percentile_interval(rng.exponential(size=1500), 99)
        covered += low <= truth <= high
    assert 0.93 <= covered / 400 <= 0.97


@pytest.mark.parametrize(("slots", "runs"), [(1, 300), (32, 80)])
def test_requests_that_share_a_steps_gap_count_once(slots: int, runs: int) -> None:
    """Lognormal steps of independent lengths; all requests of a step see its gap, a delivery apart."""
    rng = np.random.default_rng(slots)
    truth = math.exp(0.5 * 2.3263479)
    intervals = []
    for _ in range(runs):
        ends = np.cumsum(np.exp(0.5 * rng.standard_normal(1200)))
        stamps = ends + 0.01 * rng.random((slots, 1))  # a request's chunks are always delivered at the same place
        gaps, steps = joined_gaps(stamps[:, 0].tolist(), list(np.diff(stamps, axis=1)))
        assert len(np.unique(steps)) == 1199
        intervals.append(percentile_interval(gaps, 99, steps))
    covered = sum(low <= truth <= high for low, high in intervals)
    assert 0.91 <= covered / runs <= 0.99
    apart = sum(a[0] > b[1] or b[0] > a[1] for a, b in zip(intervals[::2], intervals[1::2], strict=True))
    assert apart / (runs / 2) <= 0.06


def test_slow_steps_that_follow_each_other_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    slow = np.repeat(rng.random(1000) < 0.03, 4)
    gaps = np.exp(0.1 * rng.standard_normal(4000)) * np.where(slow, 3.0, 1.0)
    assert effective_samples(gaps, 0.98) < 0.5 * effective_samples(rng.permutation(gaps), 0.98)


def test_the_p99_of_a_few_requests_has_no_upper_end() -> None:
    few = np.arange(100.0)
    low, high = percentile_interval(few, 99)
    assert high == math.inf
    assert 90 < low < 99
    apart = 0
    for seed in range(300):
        a, b = np.random.default_rng(seed).exponential(size=(2, 20))
        first, second = percentile_interval(a, 99), percentile_interval(b, 99)
        apart += first[0] > second[1] or second[0] > first[1]
    assert apart == 0


def test_a_model_of_an_engine_with_rows_that_come_and_go() -> None:
    truth = true_percentile(8, 99, 300_000)
    covered = 0
    for seed in range(40):
        gaps, steps = joined_gaps(*streams(8, 1500, seed))
        low, high = percentile_interval(gaps, 99, steps)
        covered += low <= truth <= high
    assert covered >= 36


def test_exact_and_normal_ranks_agree_where_they_meet() -> None:
    values = np.random.default_rng(3).random(20_500)
    normal = percentile_interval(values, 99)
    exact = percentile_interval(values[:19_900], 99)
    assert normal == pytest.approx(exact, abs=5e-4)


def test_no_samples_give_no_number() -> None:
    assert math.isnan(percentile(np.zeros(0), 99))
    assert all(math.isnan(v) for v in percentile_interval(np.zeros(0), 99))
    assert len(joined_gaps([1.0], [np.zeros(0)])[0]) == 0


def test_steps_of_streams_that_arrive_apart_and_of_chunks_read_at_once() -> None:
    # Two streams, the second always 1 ms later, through three steps; the first joins a step earlier.
    starts = np.array([0.00, 0.10, 0.20, 0.101, 0.201])
    ends = np.array([0.10, 0.20, 0.30, 0.201, 0.301])
    assert step_indices(starts, ends).tolist() == [0, 1, 2, 1, 2]
    # Chunks that were read at once: a gap of zero is no step of its own.
    assert step_indices(np.array([0.0, 0.1, 0.1, 0.1]), np.array([0.1, 0.1, 0.1, 0.2])).tolist() == [0, 0, 0, 1]
    assert step_indices(np.array([0.5, 0.5]), np.array([0.5, 0.5])).tolist() == [0, 0]
