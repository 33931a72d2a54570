"""Bursts: several decode steps planned at once, when nothing waits and a step is short."""

import pytest

from engine.core.policy import MAX_BURST
from engine.messages import FinishReason
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import expected_tokens

MILLISECOND = 0.001


def quick(**changes: object) -> Driver:
    """Steps of a millisecond: ten fit the latency target, eight are the most."""
    return Driver(resolved(**changes), lambda *_: MILLISECOND)


def test_short_steps_are_planned_in_bursts_and_streamed_one_by_one():
    driver = quick(max_model_len=128)
    handle = driver.add([1, 2, 3], max_tokens=80)
    driver.run()
    assert driver.tokens[handle] == expected_tokens([1, 2, 3], 80)
    assert max(message.num_steps for message in driver.worker.steps) == MAX_BURST
    times = driver.times[handle]
    assert len(set(times)) == len(times), "each token comes out when its own step is done"


def test_long_steps_are_planned_one_by_one():
    driver = Driver(seconds=lambda *_: 0.02)
    driver.add([1, 2, 3], max_tokens=40)
    driver.run()
    assert {message.num_steps for message in driver.worker.steps} == {1}


@pytest.mark.parametrize("at", range(1, 24))
def test_a_stop_in_a_burst_drops_exactly_what_was_computed_past_it(at: int):
    output = expected_tokens([7, 7], 60)
    stop = output[at]
    at = output.index(stop)
    driver = quick()
    handle = driver.add([7, 7], max_tokens=60, stop_ids=(stop,))
    driver.run()
    assert driver.tokens[handle] == output[: at + 1]
    assert driver.finished[handle].reason == FinishReason.STOP
    computed, overshoot = sum(driver.worker.batch_tokens), MAX_BURST + 1
    assert 2 + at <= computed <= 2 + at + overshoot
    assert driver.core.scheduler.pool.num_free == 64


def test_nobody_who_arrives_waits_for_more_than_the_burst_under_way():
    driver = quick(max_model_len=200, num_blocks=200)
    driver.add([1], max_tokens=150)
    for _ in range(60):
        if not driver.turn():
            driver.advance()
    arrived = driver.clock.now()
    late = driver.add([2, 2], max_tokens=3)
    driver.run()
    assert driver.times[late][0] - arrived <= (MAX_BURST + 2) * MILLISECOND + 1e-9
    assert driver.tokens[late] == expected_tokens([2, 2], 3)


def test_a_burst_takes_no_block_that_another_row_would_be_preempted_for():
    driver = quick(num_blocks=9, max_model_len=32, enable_prefix_caching=False)
    handles = [driver.add([i] * 7, max_tokens=9) for i in range(2)]
    driver.run()
    assert driver.stats.preemptions == 0, "two requests of 16 tokens fill the eight blocks exactly"
    for i, handle in enumerate(handles):
        assert driver.tokens[handle] == expected_tokens([i] * 7, 9)


def test_an_aborted_row_of_a_burst_says_nothing_more():
    driver = quick()
    handle, other = driver.add([1], max_tokens=40), driver.add([2], max_tokens=40)
    for _ in range(30):
        if not driver.turn():
            driver.advance()
    driver.abort(handle)
    driver.turn()
    count = len(driver.tokens[handle])
    driver.run()
    assert len(driver.tokens[handle]) == count
    assert driver.tokens[other] == expected_tokens([2], 40)
    assert not driver.worker.slots
