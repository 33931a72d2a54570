"""How often a process is started again."""

from hypothesis import given
from hypothesis import strategies as st

from engine.api.restarts import BACK_OFF_S, MAX_BACK_OFF_S, RESTART_PERIOD_S, RestartPolicy


def test_pauses_double_until_it_has_ended_too_often():
    policy = RestartPolicy(3)
    assert not policy.has_ended
    assert [policy.next_pause(float(at)) for at in range(4)] == [BACK_OFF_S, 2 * BACK_OFF_S, 4 * BACK_OFF_S, None]
    assert "4 times within 600 s" in policy.why_not()


def test_what_is_long_ago_does_not_count():
    policy = RestartPolicy(1)
    assert policy.next_pause(0.0) == BACK_OFF_S
    assert policy.next_pause(RESTART_PERIOD_S + 1) == BACK_OFF_S
    assert policy.next_pause(RESTART_PERIOD_S + 2) is None


@given(st.integers(0, 6), st.lists(st.floats(0, 2 * RESTART_PERIOD_S), max_size=30))
def test_never_more_than_the_limit_within_a_period(limit: int, gaps: list[float]):
    policy, now, started = RestartPolicy(limit), 0.0, list[float]()
    for gap in gaps:
        now += gap
        if policy.next_pause(now) is not None:
            started.append(now)
        assert sum(now - at <= RESTART_PERIOD_S for at in started) <= limit


def test_what_has_worked_is_started_again_soon():
    policy = RestartPolicy(100)
    assert [policy.next_pause(float(at), worked=True) for at in range(20)] == [BACK_OFF_S] * 20
    assert policy.next_pause(20.0) == 2 * BACK_OFF_S
    assert policy.next_pause(21.0) == 4 * BACK_OFF_S
    assert policy.next_pause(22.0, worked=True) == BACK_OFF_S


def test_pauses_are_bounded():
    policy = RestartPolicy(100)
    assert max(policy.next_pause(float(at)) or 0 for at in range(100)) == MAX_BACK_OFF_S
