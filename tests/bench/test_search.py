import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.arrivals import point_seed
from bench.criteria import Evidence, judge
from bench.metrics import WindowState
from bench.plan import full_requests
from bench.results import PointRow
from bench.search import Trial, answer_of_rates, bisections, find_sustained, round_rate
from tests.bench.queue_model import queue
from tests.bench.rows import plain_point


def simulated(
    capacity: float, *, noise: float = 0.0, seed: int = 0, stop_after: int = 10**9
) -> tuple[Callable[[Trial], PointRow | None], list[Trial]]:
    """A measure function that sustains what is below `capacity`, judged with a relative error of `noise` a run."""
    rng = np.random.default_rng(seed)
    trials: list[Trial] = []

    def measure(trial: Trial) -> PointRow | None:
        if len(trials) >= stop_after:
            return None
        trials.append(trial)
        good = trial.rate <= capacity * math.exp(noise * rng.standard_normal())
        binding = "" if good else "compute"
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=good, binding=binding,
            backlog_growth=0.0 if good else 99.0, backlog_noise=10.0, requests=400, reason="" if good else "grew",
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

    def limited(trial: Trial) -> PointRow | None:
        return None if trial.phase == "search" and len(trials) >= 5 else measure(trial)

    answer, _ = find_sustained(limited, start_rate=1.0, precision=0.01)
    assert answer.confirmed
    assert (answer.rate, answer.high) == (4.0, 5.657)  # 1, 2, 4, 8, 5.657, then a confirmation of 4


def test_a_rate_that_fails_its_confirmation_is_stepped_down_from() -> None:
    calls: list[Trial] = []

    def measure(trial: Trial) -> PointRow | None:
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
    def measure(trial: Trial) -> PointRow | None:
        short = trial.phase == "search" and trial.repeat == 0 and trial.rate in (1, 2, 4)
        good = trial.rate <= 4.3 and not (short and trial.rate == 4)
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=good, requests=20 if short else 400,
            backlog_growth=0.0 if good else 6.0, backlog_noise=5.0,
        )  # fmt: skip

    answer, rows = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert [r.sustained for r in rows if r.rate == 4.0] == [False, True, True][: sum(r.rate == 4.0 for r in rows)]
    assert answer.rate is not None
    assert 4.0 <= answer.rate <= 4.3


def test_a_client_that_can_not_go_further_binds() -> None:
    def measure(trial: Trial) -> PointRow | None:
        if trial.rate > 10:
            return plain_point(rate=trial.rate, phase=trial.phase, valid=False, sustained=None, binding="client")
        return plain_point(rate=trial.rate, phase=trial.phase)

    answer, _ = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert answer.binding == "client"
    assert answer.rate is not None
    assert 9 < answer.rate <= 10


def test_a_point_no_other_rate_would_mend_ends_the_search() -> None:
    def measure(trial: Trial) -> PointRow | None:
        return plain_point(
            rate=trial.rate, valid=False, sustained=None, reason="5 of 8 outputs had not the asked length"
        )

    answer, rows = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert len(rows) == 1
    assert answer.rate is None
    assert "asked length" in answer.note
    assert "no rate" in answer.line()


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
        plain_point(rate=r, phase="fixed", sustained=r not in (3.0, 5.0), binding="rows") for r in (1, 2, 3.0, 4, 5.0)
    ]
    answer = answer_of_rates(rows, "c", "w")
    assert (answer.rate, answer.high, answer.confirmed, answer.binding) == (2, 3.0, False, "rows")
    assert answer_of_rates(rows[:2], "c", "w").binding == "not reached"
    assert answer_of_rates([], "c", "w").rate is None


@given(st.floats(1.0, 1e4), st.sampled_from([0.01, 0.05, 0.1, 0.5]))
def test_bisections_are_enough(ratio: float, precision: float) -> None:
    n = bisections(ratio, precision)
    assert ratio ** (1 / 2**n) <= (1 + precision) * 1.0001
    assert n == 0 or ratio ** (1 / 2 ** (n - 1)) > 1 + precision


@pytest.mark.parametrize("slots", [2, 8])
def test_with_the_real_rule_the_answer_is_within_5_percent_of_a_queues_capacity(slots: int) -> None:
    """Search, criteria and seeds together on a simulated queue; full windows of 1,600 requests, 10 seeds."""
    for seed in range(10):

        def measure(trial: Trial, seed: int = seed) -> PointRow | None:
            short = trial.points_left > 1 + bisections(2.0, 0.05)  # as the planner has it while doubling
            count = max(8 if short else full_requests(0.05), math.ceil(5 * trial.rate))
            drawn = point_seed(seed, "20/5", trial.rate, trial.repeat)
            flow = queue(trial.rate, slots, 1.0, count, drawn, warmup=max(3, round(1.25 * trial.rate)))
            verdict = judge(Evidence(flow, WindowState(preemptions=0), requests=flow.arrived()))
            return plain_point(
                rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=verdict.sustained,
                requests=flow.arrived(), backlog_growth=verdict.growth, backlog_noise=verdict.noise,
                binding=verdict.binding,
            )  # fmt: skip

        answer, _ = find_sustained(measure, start_rate=0.83, precision=0.05)
        assert answer.confirmed
        assert answer.rate == pytest.approx(slots, rel=0.05)
