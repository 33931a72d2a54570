"""Scheduling late: a request that arrives during a step is in the next one, and the device never idles."""

import numpy as np
import pytest

from engine.core.step_timer import MARGIN_S, SCHEDULE_AT, StepTimer
from engine.core.steps import ScheduledStep
from engine.messages import StepMessage
from tests.engine.core_driver import Driver

SLOW_S, QUICK_S = 0.04, 0.004


def scheduled(tokens: int) -> ScheduledStep:
    """A step in which two slots sample."""
    return ScheduledStep(0, StepMessage(0), np.zeros(2, np.intp), np.zeros(2, np.int32), tokens)


def test_a_request_that_arrives_during_a_step_is_in_the_next_one():
    driver = Driver(seconds=lambda *_: 1.0)
    first = driver.add([1], max_tokens=12)
    while len(driver.tokens[first]) < 3:
        if not driver.turn():
            driver.advance()
    began = driver.clock.now()
    assert not driver.turn(), "the next step isn't planned yet"
    driver.clock.advance(SCHEDULE_AT - 0.05)
    second = driver.add([2], max_tokens=2)
    driver.run()
    assert driver.times[second] == [began + 2, began + 3]
    assert np.diff(driver.times[first]).tolist() == [1.0] * 11, "the device never waited"


def test_the_next_step_is_scheduled_when_most_of_a_long_one_is_over():
    timer = StepTimer()
    timer.start_step(1.0, scheduled(2))
    assert timer.next_schedule_at == 1.0, "nothing is known of such steps yet"
    timer.finish_step(scheduled(2), SLOW_S)
    assert timer.decode_step_s == SLOW_S
    timer.start_step(2.0, scheduled(2))
    assert timer.next_schedule_at == pytest.approx(2.0 + SCHEDULE_AT * SLOW_S)
    timer.start_step(2.0, scheduled(100))
    assert timer.next_schedule_at == 2.0, "a step with parts of prompts is another kind"
    timer.finish_step(scheduled(100), 0.1)
    for tokens, expected in ((100, 0.1), (400, 0.1), (50, 0.05)):
        timer.start_step(3.0, scheduled(tokens))
        assert timer.next_schedule_at == pytest.approx(3.0 + SCHEDULE_AT * expected), "sooner with fewer tokens"
    timer.start_step(3.0, scheduled(8))
    assert timer.next_schedule_at == pytest.approx(3.0 + 0.008 - MARGIN_S)


def test_short_steps_are_followed_at_once_and_empty_ones_are_not_averaged():
    timer = StepTimer()
    timer.finish_step(scheduled(2), QUICK_S)
    timer.finish_step(scheduled(0), 0.0001)
    assert timer.decode_step_s == QUICK_S
    timer.start_step(1.0, scheduled(2))
    assert timer.next_schedule_at == 1.0
