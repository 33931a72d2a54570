import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.results import PointRecord
from bench.search.bracket import CONFIRMATION_RUNS, Trial, bisections, round_rate
from bench.search.search import answer_of_rates, find_sustained
from tests.bench.queue_model import SimulatedBench
from tests.bench.records import plain_point


def simulated(
    capacity: float, *, noise: float = 0.0, seed: int = 0, stop_after: int = 10**9
) -> tuple[Callable[[Trial], PointRecord | None], list[Trial]]:
    """A measure function that sustains what is below `capacity`, judged with a relative error of `noise` a run."""
    rng, counts = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    trials: list[Trial] = []

    def measure(trial: Trial) -> PointRecord | None:
        if len(trials) >= stop_after:
            return None
        trials.append(trial)
        good = trial.rate <= capacity * math.exp(noise * rng.standard_normal())
        binding = "" if good else "compute"
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=good, binding=binding,
            backlog_growth=0.0 if good else 99.0, backlog_noise=10.0, requests=400, reason="" if good else "grew",
            achieved_rate=min(trial.rate, capacity) * math.exp(noise / 3 * counts.standard_normal()),
        )  # fmt: skip

    return measure, trials


@settings(max_examples=200, deadline=None)
@given(st.floats(0.05, 500), st.sampled_from([0.02, 0.05, 0.1, 0.2]), st.floats(-4, 8))
def test_finds_any_capacity_within_precision(capacity: float, precision: float, doublings: float) -> None:
    measure, trials = simulated(capacity)
    answer, rows = find_sustained(measure, start_rate=capacity / 2**doublings, precision=precision)
    assert answer.rate is not None
    assert answer.confirmed
    assert capacity / (1 + precision) / 1.002 <= answer.rate <= capacity * 1.0001
    assert answer.high is not None
    assert answer.rate <= capacity <= answer.high * 1.0001
    assert answer.low < answer.rate
    assert answer.binding == "compute"
    assert [(t.rate, t.phase) for t in trials] == [(r.rate, r.phase) for r in rows]
    assert len({(t.rate, t.repeat) for t in trials}) == len(trials)  # no two runs share their requests
    assert trials[-1].phase == "confirm"


def test_noisy_judgements_stay_near_the_truth() -> None:
    found = []
    for seed in range(50):
        measure, _ = simulated(7.3, noise=0.02, seed=seed)
        answer, _ = find_sustained(measure, start_rate=0.5, precision=0.05)
        assert answer.rate is not None
        assert answer.confirmed
        found.append(answer.rate / 7.3)
    assert min(found) > 0.9
    assert max(found) < 1.06
    assert 0.95 < float(np.median(found)) < 1.01


@given(stop_after=st.integers(0, 14))
@settings(max_examples=30, deadline=None)
def test_running_out_of_time_reports_the_bracket_so_far(stop_after: int) -> None:
    measure, trials = simulated(5.0, stop_after=stop_after)
    answer, rows = find_sustained(measure, start_rate=1.0, precision=0.05)
    assert len(rows) == len(trials) <= stop_after
    assert not answer.confirmed or trials[-1].phase == "confirm"
    sustained = [r.rate for r in rows if r.sustained]
    assert answer.rate == max(sustained, default=None)
    assert answer.high == min((r.rate for r in rows if not r.sustained), default=None)


def test_time_kept_for_confirming_is_used_when_the_search_stops() -> None:
    measure, trials = simulated(5.0)

    def limited(trial: Trial) -> PointRecord | None:
        return None if trial.phase == "search" and len(trials) >= 5 else measure(trial)

    answer, _ = find_sustained(limited, start_rate=1.0, precision=0.01)
    assert answer.confirmed
    assert (answer.rate, answer.high) == (4.0, 5.657)  # 1, 2, 4, 8, 5.657, then a confirmation of 4


def test_a_rate_that_fails_its_confirmation_is_stepped_down_from() -> None:
    calls: list[Trial] = []

    def measure(trial: Trial) -> PointRecord | None:
        calls.append(trial)
        # Above 3 only luck helps: the first run of a rate is sustained up to 5, every further one up to 3.
        good = trial.rate <= (3.0 if trial.phase == "confirm" else 5.0)
        return plain_point(rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=good, binding="KV cache")

    answer, _ = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert answer.confirmed
    assert answer.rate is not None
    assert 2.7 <= answer.rate <= 3.0
    assert answer.high is not None
    assert answer.high <= answer.rate * 1.1001
    assert answer.binding == "KV cache"


def test_an_upper_end_from_a_short_window_is_tried_again() -> None:
    def measure(trial: Trial) -> PointRecord | None:
        short = trial.phase == "search" and trial.repeat == 0 and trial.rate in (1, 2, 4)
        good = trial.rate <= 4.3 and not (short and trial.rate == 4)
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=good, requests=20 if short else 400,
            backlog_growth=0.0 if good else 6.0, backlog_noise=5.0,
        )  # fmt: skip

    answer, rows = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert [r.sustained for r in rows if r.rate == 4.0][:2] == [False, True]
    assert answer.rate is not None
    assert 4.0 <= answer.rate <= 4.3


def noisy_at_8(capacity: float, lucky: set[int]) -> Callable[[Trial], PointRecord | None]:
    """Up to `capacity` all is sustained, but at 8 req/s the runs in `lucky` and no others are."""

    def measure(trial: Trial) -> PointRecord | None:
        good = trial.repeat in lucky if trial.rate == 8 else trial.rate <= capacity
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=good, requests=400,
            binding="" if good else "compute", backlog_growth=0.0 if good else 35.0, backlog_noise=10.0,
        )  # fmt: skip

    return measure


def test_a_slow_moment_of_the_machine_does_not_make_the_upper_end() -> None:
    answer, rows = find_sustained(noisy_at_8(10, set(range(1, 20))), start_rate=1.0, precision=0.1)
    assert [r.sustained for r in rows if r.rate == 8][:3] == [False, True, True]
    assert answer.confirmed
    assert answer.rate is not None
    assert 10 / 1.1 <= answer.rate <= 10
    assert answer.high is not None
    assert sum(r.rate == answer.high for r in rows) == 2, "the new one was looked at twice too"


def test_a_lucky_moment_does_not_move_the_upper_end() -> None:
    answer, rows = find_sustained(noisy_at_8(7.9, {1}), start_rate=1.0, precision=0.1)
    assert [r.sustained for r in rows if r.rate == 8] == [False, True, False]
    assert answer.confirmed
    assert answer.high == 8
    assert answer.rate is not None
    assert 7.9 / 1.1 <= answer.rate <= 7.9


def test_an_upper_end_that_only_overload_explains_is_not_tried_again() -> None:
    measure, trials = simulated(5.0)
    answer, _ = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert [t.repeat for t in trials if t.rate == answer.high] == [0]


def test_a_client_that_can_not_go_further_binds() -> None:
    def measure(trial: Trial) -> PointRecord | None:
        if trial.rate > 10:
            return plain_point(rate=trial.rate, phase=trial.phase, valid=False, sustained=None, binding="client")
        return plain_point(rate=trial.rate, phase=trial.phase)

    answer, _ = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert answer.binding == "client"
    assert answer.rate is not None
    assert 9 < answer.rate <= 10


def test_a_point_spoilt_by_the_client_is_run_once_more() -> None:
    sustained, trials = simulated(10.0)

    def measure(trial: Trial) -> PointRecord | None:
        if trial.repeat == 0 and trial.phase == "search":
            return plain_point(rate=trial.rate, phase=trial.phase, valid=False, sustained=None, binding="client")
        return sustained(trial)

    answer, rows = find_sustained(measure, start_rate=4.0, precision=0.1)
    assert [(r.rate, r.repeat, r.sustained) for r in rows[:2]] == [(4.0, 0, None), (4.0, 1, True)]
    assert answer.confirmed
    assert answer.rate is not None
    assert 9 < answer.rate <= 10
    assert answer.binding == "compute"
    assert trials


def test_a_point_no_other_rate_would_mend_ends_the_search() -> None:
    def measure(trial: Trial) -> PointRecord | None:
        return plain_point(
            rate=trial.rate, valid=False, sustained=None, reason="5 of 8 outputs did not have the requested length"
        )

    answer, rows = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert len(rows) == 1
    assert answer.rate is None
    assert "requested length" in answer.note
    assert "sustains none of the measured rates" in answer.line()


def test_nothing_sustained_and_everything_sustained_end_too() -> None:
    measure, trials = simulated(1e-9)
    answer, _ = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert answer.rate is None
    assert answer.high == round_rate(1 / 2**6)
    assert len(trials) == 7
    measure, trials = simulated(1e99)
    answer, _ = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert answer.high is None
    assert answer.binding == "not reached"
    assert answer.confirmed
    assert len(trials) < 30


def test_given_rates_are_read_up_to_the_first_that_fails() -> None:
    rows = [
        plain_point(rate=r, phase="fixed", sustained=r not in (3.0, 5.0), binding="batch slots")
        for r in (1, 2, 3.0, 4, 5.0)
    ]
    answer = answer_of_rates(rows, "c", "w")
    assert (answer.rate, answer.high, answer.confirmed, answer.binding) == (2, 3.0, False, "batch slots")
    assert answer_of_rates(rows[:2], "c", "w").binding == "not reached"
    assert answer_of_rates([], "c", "w").rate is None


@given(st.floats(1.0, 1e4), st.sampled_from([0.01, 0.05, 0.1, 0.5]))
def test_bisections_are_enough(ratio: float, precision: float) -> None:
    n = bisections(ratio, precision)
    assert ratio ** (1 / 2**n) <= (1 + precision) * 1.0001
    assert n == 0 or ratio ** (1 / 2 ** (n - 1)) > 1 + precision


@pytest.mark.parametrize("slots", [2, 8, 32])
def test_with_the_real_rule_the_answer_is_within_5_percent_of_a_queues_capacity(slots: int) -> None:
    """Search, plan of windows, criteria and seeds on a simulated queue; full windows of 1,600 requests, 10 seeds."""
    covered = 0
    for seed in range(10):
        answer, rows = SimulatedBench(slots, seed, precision=0.05).search(start_rate=0.83)
        assert answer.confirmed
        assert not answer.provisional
        assert answer.rate == pytest.approx(slots, rel=0.05)
        assert answer.high is not None
        covered += answer.low <= slots <= answer.high
        runs = [r for r in rows if r.rate == answer.rate and r.phase == "confirm" and not r.undecided]
        assert len(runs) == CONFIRMATION_RUNS
        assert len({r.repeat for r in runs}) == CONFIRMATION_RUNS
    assert covered >= 9  # 95 % of them, on average


def test_the_interval_widens_with_the_spread_of_the_confirmation_runs() -> None:
    lows = []
    for noise in (0.0, 0.01, 0.05):
        measure, _ = simulated(5.0, noise=noise, seed=3)
        done = iter((1 + noise, 1 - noise, 1.0) * 20)

        def spread(trial: Trial, measure: Callable[..., PointRecord | None] = measure, done=done) -> PointRecord | None:  # type: ignore[no-untyped-def]
            row = measure(trial)
            if row is not None and trial.phase == "confirm":
                row.achieved_rate = trial.rate * next(done)
            return row

        answer, _ = find_sustained(spread, start_rate=4.0, precision=0.5)
        assert answer.rate == 4.0
        lows.append(answer.low)
    assert lows[0] == pytest.approx(4.0 * (1 - 1 / 400))
    assert lows[1] == pytest.approx(4.0 * (1 - 4.303 * 0.01 / math.sqrt(3)))
    assert lows[2] == pytest.approx(4.0 * (1 - 4.303 * 0.05 / math.sqrt(3)))


def test_further_runs_may_outvote_a_confirmation() -> None:
    def measure(trial: Trial) -> PointRecord | None:
        good = trial.rate <= 3.0 or (trial.rate <= 4.0 and trial.repeat < 2)
        return plain_point(rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=good, requests=400)

    answer, rows = find_sustained(measure, start_rate=4.0, precision=0.1)
    assert [(r.phase, r.sustained) for r in rows if r.rate == 4.0][:3] == [
        ("search", True), ("confirm", True), ("confirm", False),
    ]  # fmt: skip
    assert answer.confirmed
    assert answer.rate is not None
    assert 2.7 < answer.rate <= 3.0
    assert answer.high is not None
    assert answer.high <= answer.rate * 1.101


def test_repeats_that_no_longer_fit_leave_the_answer_confirmed() -> None:
    bench = SimulatedBench(4, 1, precision=0.1, max_minutes=40)
    answer, rows = bench.search(start_rate=0.83)
    assert answer.confirmed
    assert bench.now_s <= 40 * 60
    assert all(r.requests >= 350 for r in rows if r.phase == "confirm" and r.repeat > 1)
