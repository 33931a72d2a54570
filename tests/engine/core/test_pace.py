"""Planning late: who comes while a step runs is in the next one, and the device doesn't wait for it."""

import numpy as np
import pytest

from engine.core.pace import LATE, SLACK_S, Pace
from engine.core.plan import Plan
from engine.messages import StepMessage
from tests.engine.core_driver import Driver

SLOW_S, QUICK_S = 0.04, 0.004


def plan(tokens: int) -> Plan:
    """Of two rows that sample."""
    return Plan(0, StepMessage(0), np.zeros(2, np.intp), np.zeros(2, np.int32), tokens)


def test_who_comes_while_a_step_runs_is_in_the_next_one():
    driver = Driver(seconds=lambda *_: 1.0)
    first = driver.add([1], max_tokens=12)
    while len(driver.tokens[first]) < 3:
        if not driver.turn():
            driver.advance()
    began = driver.clock.now()
    assert not driver.turn(), "the next step isn't planned yet"
    driver.clock.advance(LATE - 0.05)
    second = driver.add([2], max_tokens=2)
    driver.run()
    assert driver.times[second] == [began + 2, began + 3]
    assert np.diff(driver.times[first]).tolist() == [1.0] * 11, "the device never waited"


def test_the_next_step_is_planned_when_most_of_a_long_one_is_over():
    pace = Pace()
    pace.begin(1.0, plan(2))
    assert pace.plan_at == 1.0, "nothing is known of such steps yet"
    pace.end(plan(2), SLOW_S)
    assert pace.decode_s == SLOW_S
    pace.begin(2.0, plan(2))
    assert pace.plan_at == pytest.approx(2.0 + LATE * SLOW_S)
    pace.begin(2.0, plan(100))
    assert pace.plan_at == 2.0, "a step with parts of prompts is another kind"
    pace.end(plan(100), 0.1)
    for tokens, expected in ((100, 0.1), (400, 0.1), (50, 0.05)):
        pace.begin(3.0, plan(tokens))
        assert pace.plan_at == pytest.approx(3.0 + LATE * expected), "never later than usual, sooner with fewer tokens"
    pace.begin(3.0, plan(8))
    assert pace.plan_at == pytest.approx(3.0 + 0.008 - SLACK_S)


def test_short_steps_are_planned_at_once_and_empty_ones_teach_nothing():
    pace = Pace()
    pace.end(plan(2), QUICK_S)
    pace.end(plan(0), 0.0001)
    assert pace.decode_s == QUICK_S
    pace.begin(1.0, plan(2))
    assert pace.plan_at == 1.0
