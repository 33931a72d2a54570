"""The search with disturbed load points, and with windows that are undecided."""

from collections.abc import Callable
from dataclasses import replace

from bench.results import PointRecord
from bench.search.bracket import Trial
from bench.search.search import answer_of_rates, find_sustained
from tests.bench.records import plain_point
from tests.bench.search.test_search import simulated


def disturbed(
    capacity: float, when: Callable[[int], bool]
) -> tuple[Callable[[Trial], PointRecord | None], list[Trial]]:
    """As simulated(), but others take 40 % of the cores and half of the capacity in the runs that `when` picks."""
    trials: list[Trial] = []

    def measure(trial: Trial) -> PointRecord | None:
        trials.append(trial)
        busy = when(len(trials) - 1)
        good = trial.rate <= (capacity / 2 if busy else capacity)
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, sustained=good, binding="" if good else "compute",
            backlog_growth=0.0 if good else 99.0, backlog_noise=10.0, requests=400, achieved_rate=trial.rate,
            others_cpu_share=0.4 if busy else 0.02, steal_share=0.0, disturbed=busy,
        )  # fmt: skip

    return measure, trials


def test_a_disturbed_point_is_measured_again_and_counts_for_nothing() -> None:
    measure, trials = disturbed(7.3, lambda i: i in (2, 5, 9))
    answer, rows = find_sustained(measure, start_rate=1.0, precision=0.05)
    for i, row in enumerate(rows):
        if row.disturbed:
            assert (rows[i + 1].rate, rows[i + 1].repeat) == (row.rate, row.repeat + 1)
            assert not rows[i + 1].disturbed
    assert sum(row.disturbed for row in rows) == 3
    assert answer.rate is not None
    assert 7.3 / 1.06 <= answer.rate <= 7.3
    assert (answer.provisional, answer.disturbance) == (False, "")
    assert len({(t.rate, t.repeat) for t in trials}) == len(trials)


def test_an_answer_that_rests_on_disturbed_points_is_provisional_and_says_why() -> None:
    measure, _ = disturbed(7.3, lambda i: True)
    answer, rows = find_sustained(measure, start_rate=1.0, precision=0.05)
    assert answer.rate is not None
    assert answer.rate <= 3.65
    assert answer.provisional
    assert "provisional: other processes used 40% of the cores)" in answer.line()
    # Where it goes on for ever, repetitions are given up.
    _, undisturbed = (
        disturbed(3.65, lambda i: False),
        find_sustained(simulated(3.65)[0], start_rate=1.0, precision=0.05),
    )
    assert len(rows) <= len(undisturbed[1]) + 3


def test_without_time_a_disturbed_point_stands() -> None:
    measure, trials = disturbed(7.3, lambda i: i == 1)
    answer, _ = find_sustained(
        lambda t: None if t.whole or len(trials) == 2 else measure(t), start_rate=1.0, precision=0.05
    )
    assert answer.rate == 2.0
    assert "other processes used 40% of the cores" in answer.line()


def test_nothing_sustained_beside_others_is_provisional_too() -> None:
    rows = [plain_point(rate=4.0, sustained=False, disturbed=True, others_cpu_share=0.3, steal_share=0.25)]
    line = answer_of_rates(rows, "c", "w").line()
    assert line.startswith("sustains none of the measured rates (the lowest, 4 req/s, failed, provisional: ")
    assert "provisional: other processes used 30% of the cores" in line
    assert "and the hypervisor took" in line


def undecided_below(capacity: float, enough: int) -> Callable[[Trial], PointRecord | None]:
    """Windows of fewer than `enough` seconds can't decide; the first one of a rate has 100."""

    def measure(trial: Trial) -> PointRecord | None:
        window_s = trial.window_s or 100.0
        decided, good = window_s >= enough, trial.rate <= capacity
        verdict = ("sustained" if good else "not sustained") if decided else "undecided"
        return plain_point(
            rate=trial.rate, phase=trial.phase, repeat=trial.repeat, window_s=window_s, requests=round(4 * window_s),
            sustained=good if decided else None, verdict=verdict, binding="" if good or not decided else "compute",
            reason="undecided: too few requests (40)" if not decided else "", backlog_growth=0.0 if good else 99.0,
            backlog_noise=10.0,
        )  # fmt: skip

    return measure


def test_a_window_that_can_not_decide_is_followed_by_longer_ones() -> None:
    answer, rows = find_sustained(undecided_below(5.0, 350), start_rate=1.0, precision=0.1)
    assert answer.confirmed
    assert answer.rate is not None
    assert 4.5 <= answer.rate <= 5.0
    assert answer.undecided is None
    tried = [r.window_s for r in rows if r.rate == answer.rate]
    assert tried[:3] == [100.0, 200.0, 400.0]
    assert all(r.window_s == 400.0 for r in rows if r.sustained)


def test_where_no_window_decides_the_answer_says_so_and_no_rate_counts_as_sustained() -> None:
    answer, rows = find_sustained(undecided_below(5.0, 10**9), start_rate=1.0, precision=0.1)
    assert answer.rate is None
    assert answer.high is None
    assert (answer.binding, answer.undecided) == ("undecided", min(r.rate for r in rows))
    assert answer.line().startswith("undecided at")
    assert not answer.confirmed
    assert len(rows) < 100


def test_a_rate_that_was_sustained_stays_so_if_the_time_is_too_short_to_decide_it_again() -> None:
    def measure(trial: Trial) -> PointRecord | None:
        if trial.phase == "confirm" and (trial.repeat > 1 or trial.window_s):
            return None  # no time for a further or a longer window
        window_s = 50.0 if trial.phase == "confirm" else 400.0
        return undecided_below(5.0, 350)(replace(trial, window_s=window_s))

    answer, rows = find_sustained(measure, start_rate=4.0, precision=0.5)
    assert [(r.rate, r.phase, r.undecided) for r in rows][-1] == (4.0, "confirm", True)
    assert (answer.rate, answer.confirmed) == (4.0, False)
    assert "not confirmed" in answer.line()


def test_where_the_time_is_over_before_any_rate_is_decided_the_rest_goes_to_the_lowest() -> None:
    decides = undecided_below(5.0, 350)

    def measure(trial: Trial) -> PointRecord | None:
        if trial.phase == "search":
            return decides(trial) if trial.rate < 4 else None  # no further window fits into the time for searching
        return decides(replace(trial, window_s=400.0)) if trial.repeat == 1 else None

    answer, rows = find_sustained(measure, start_rate=1.0, precision=0.1)
    assert [(r.rate, r.phase, r.sustained) for r in rows][-1] == (1.0, "confirm", True)
    assert (answer.rate, answer.confirmed, answer.undecided) == (1.0, True, 2.0)


def test_given_rates_of_which_some_could_not_be_decided() -> None:
    verdicts = {1.0: "sustained", 2.0: "undecided", 3.0: "not sustained"}
    known = {"sustained": True, "undecided": None, "not sustained": False}
    rows = [plain_point(rate=r, phase="fixed", sustained=known[v], verdict=v) for r, v in verdicts.items()]
    answer = answer_of_rates(rows, "c", "w")
    assert (answer.rate, answer.undecided, answer.high) == (1.0, 2.0, 3.0)
    assert "undecided from 2" in answer.line()
    only = answer_of_rates(rows[1:2], "c", "w")
    assert (only.rate, only.undecided, only.high, only.binding) == (None, 2.0, None, "undecided")
