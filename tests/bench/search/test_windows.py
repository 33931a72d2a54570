import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.search.bracket import Trial
from bench.search.windows import LADDER, Planner, TimeBudget, full_requests, is_provisional, ladder_rates, phase_repeat


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def planner(limit_s: float = 900.0, *, ladder: bool = True, window_s: float | None = None) -> tuple[Planner, Hands]:
    clock = Hands()
    budget = TimeBudget(limit_s, clock)
    budget.start()
    return Planner(budget, 0.1, ladder, window_s), clock


def test_a_full_window_holds_latencies_and_requests() -> None:
    plan, _ = planner()
    assert full_requests(0.1) == 400
    assert full_requests(0.05) == 1600
    assert plan.full_window(4.0, 2.0) == 100.0  # 400 requests
    assert plan.full_window(100.0, 2.0) == 10.0  # 5 latencies
    assert not is_provisional(0.1, 100.0, 400, 2.0)
    assert is_provisional(0.1, 100.0, 300, 2.0)
    assert is_provisional(0.1, 9.0, 400, 4.0)


def test_windows_are_full_where_time_allows_and_hold_whole_requests() -> None:
    plan, _ = planner(100_000.0)
    lengths = plan.search_timing(Trial(4.1, "confirm"), 2.0)
    assert lengths is not None
    assert lengths.window_s * 4.1 == pytest.approx(400)
    assert lengths.warmup_s == 2.5
    assert lengths.drain_s >= 6


def test_a_warmup_that_is_given_comes_before_every_window_and_a_server_may_want_a_longer_one() -> None:
    plan, _ = planner(100_000.0)
    for changed, warmup_s in ((replace(plan, warmup_s=7.0), 7.0), (replace(plan, warmup_latencies=3.0), 6.0)):
        timings = (
            changed.search_timing(Trial(4.0, "search"), 2.0),
            changed.fixed_timing(4.0, 2.0, 1),
            changed.ladder_timing(4.0, 4.0, 2.0, 1),
        )
        assert [one and one.warmup_s for one in timings] == [warmup_s] * 3


def test_a_long_warmup_is_planned_within_the_limit() -> None:
    plan, _ = planner(100.0)
    assert replace(plan, warmup_s=98.0).fixed_timing(4.0, 2.0, 1) is None
    timing = replace(plan, warmup_s=60.0).fixed_timing(4.0, 2.0, 1)
    assert timing is not None
    assert timing.window_s <= 40.0


def test_a_doubling_point_is_short_and_a_bisection_is_not() -> None:
    plan, _ = planner(100_000.0)
    first = plan.search_timing(Trial(1.0, "search", points_left=7), 1.0)
    later = plan.search_timing(Trial(1.0, "search", points_left=3), 1.0)
    assert first is not None
    assert later is not None
    assert first.window_s < 30
    assert later.window_s == pytest.approx(400)


@given(
    st.floats(20, 3600), st.floats(0, 1), st.floats(0.05, 50), st.floats(0.05, 60),
    st.sampled_from(["search", "confirm"]), st.integers(1, 9),
)  # fmt: skip
def test_no_point_is_planned_past_the_limit(limit_s, used, rate, latency_s, phase, points_left) -> None:  # type: ignore[no-untyped-def]
    plan, clock = planner(limit_s)
    clock.now += used * limit_s
    lengths = plan.search_timing(Trial(rate, phase, points_left=points_left), latency_s)
    left = plan.budget.left_s()
    if lengths is not None:
        assert lengths.warmup_s + lengths.window_s <= left + 0.5 / rate  # windows are rounded to whole requests
        assert lengths.window_s > 0
    else:
        assert left < limit_s or limit_s < 40 * latency_s + 40 / rate + 20


def test_a_search_leaves_time_for_confirmation_and_that_for_the_ladder() -> None:
    plan, clock = planner(100.0)
    clock.now += 65
    assert plan.search_timing(Trial(4.0, "search", points_left=1), 1.0) is None
    confirm = plan.search_timing(Trial(4.0, "confirm"), 1.0)
    assert confirm is not None
    clock.now += 20
    assert plan.search_timing(Trial(4.0, "confirm"), 1.0) is None
    assert plan.ladder_timing(4.0, 4.0, 1.0, 2) is not None
    clock.now += 15
    assert plan.ladder_timing(4.0, 4.0, 1.0, 1) is None


def test_a_given_window_is_taken_as_it_is_or_not_at_all() -> None:
    plan, clock = planner(100.0, window_s=30.0)
    for points_left in (1, 9):
        lengths = plan.search_timing(Trial(2.0, "confirm", points_left=points_left), 1.0)
        assert lengths is not None
        assert lengths.window_s == 30.0
    clock.now += 80
    assert plan.fixed_timing(2.0, 1.0, 1) is None


def test_ctrl_c_leaves_no_time() -> None:
    plan, _ = planner()
    plan.budget.stopped = True
    assert plan.budget.left_s() == 0
    assert plan.fixed_timing(2.0, 1.0, 1) is None


def test_ladder_and_seeds() -> None:
    assert ladder_rates(4.0) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert len(LADDER) == 6
    # The ladder passes the rate found again, and a confirmation repeats it: none may send the same prompts.
    runs = {phase_repeat("search", 0), phase_repeat("confirm", 1), phase_repeat("ladder", 0), phase_repeat("probe", 0)}
    assert len(runs) == 4


def test_expected_time_stays_within_the_limit() -> None:
    plan, _ = planner(600.0)
    low, high = sorted(plan.expected_s(0.5, 2.0))
    assert 0 < low <= high <= 600
    assert plan.fixed_s([1.0, 2.0], 1.0) == 600
    assert math.isclose(planner(1e9)[0].fixed_s([1.0, 2.0], 1.0), 400 + 200 + 2 * 3.25)


def test_a_run_for_the_interval_is_whole_or_not_at_all() -> None:
    plan, clock = planner(900.0)
    wanted = Trial(4.0, "confirm", whole=True)
    lengths = plan.search_timing(wanted, 2.0)
    assert lengths is not None
    assert lengths.window_s == 100.0
    clock.now += 0.68 * 900 - 100  # a window would fit, but not what is around it, and the ladder is still to come
    assert plan.search_timing(wanted, 2.0) is None
    assert plan.search_timing(Trial(4.0, "confirm"), 2.0) is not None
