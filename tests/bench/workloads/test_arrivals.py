"""Arrival times: seeded, sorted, exact in their mean rate."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.workloads.arrivals import KINDS, Arrivals, arrival_times, point_seed, read_trace

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


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


CSV = "timestamp,input_tokens,output_tokens\n100,5,2\n101,6,3\n104,7,4\n102,8,5\n"
JSONL = (
    '{"timestamp": 0, "input_length": 5, "output_length": 2}\n'
    '{"timestamp": 8.5, "input_length": 6, "output_length": 3}\n'
)


def test_a_trace_is_sorted_and_keeps_its_lengths(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t.csv", CSV))
    assert trace.times.tolist() == [0, 1, 2, 4]
    assert (trace.inputs, trace.outputs) == ([5, 6, 8, 7], [2, 3, 5, 4])
    assert trace.rate == 0.75
    assert read_trace(write(tmp_path / "t.jsonl", JSONL)).inputs == [5, 6]
    assert read_trace(write(tmp_path / "u.csv", "time\n1\n2\n")).inputs is None


def test_replay_scales_and_begins_again(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", CSV)
    own = Arrivals(trace=path).schedule(0.75, (0.0, 5.0, 5.0), 1)
    period = 4 / 0.75
    assert own == pytest.approx([0, 1, 2, 4, period, period + 1, period + 2, period + 4])
    twice = Arrivals(trace=path).schedule(1.5, (0.0, 5.0), 9)
    assert twice == pytest.approx(own / 2)
    assert len(Arrivals(trace=path).schedule(10, (10.0, 90.0, 0.0), 0)) == pytest.approx(1000, abs=4)


@given(rates, st.lists(st.floats(0.0, 20), min_size=1, max_size=3), seeds, st.sampled_from(KINDS))
def test_a_schedule_holds_rate_x_length_of_each_part(rate: float, parts: list[float], seed: int, kind: str) -> None:
    times = Arrivals(kind, 0.5).schedule(rate, parts, seed)
    assert np.all(np.diff(times) >= 0)
    start = 0.0
    for length in parts:
        inside = np.count_nonzero((times >= start - 1e-9) & (times < start + length - 1e-9))
        instants = sum(0 < one < 1e-8 for one in parts)  # each holds one arrival, which a neighbour's edge may hold too
        assert inside <= round(rate * length) + max(2, 1 + instants)
        start += length
    assert np.all(times <= sum(parts) + 1e-6)
    assert np.array_equal(times, Arrivals(kind, 0.5).schedule(rate, parts, seed))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("when\n1\n2\n", "no column timestamp"),
        ("", "no column timestamp"),
        ("timestamp\n1\n", "at least two requests"),
        ("timestamp\n1\n1\n", "at least two requests"),
        ("timestamp\n1\nx\n", "row 2 has no number"),
        ("timestamp,input_tokens\n1,0\n2,4\n", "an integer of at least 1"),
        ("{oops", "neither CSV nor JSONL"),
    ],
)
def test_a_bad_trace_is_named(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BenchError, match=f"{words}.*--trace"):
        Arrivals(trace=str(path))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(BenchError, match="--arrivals"):
        Arrivals("uniform")


def test_no_arrival_falls_into_the_part_before_by_rounding() -> None:
    for seed in range(200):
        warmup = 0.0099371 * (seed + 1) / 3
        nanoseconds = (Arrivals().schedule(40, (warmup, 1.0, 1.0), seed) * 1e9).astype(np.int64)
        inside = (nanoseconds / 1e9 >= warmup) & (nanoseconds / 1e9 < warmup + 1.0)
        assert np.count_nonzero(inside) == 40
