"""The ablations that make V1 into V0, one by one and all together, and the priority policy."""

from itertools import pairwise
from typing import Any

import pytest

from engine.config import ABLATIONS, CHUNKING
from engine.core.policy import SchedulingPolicy
from engine.messages import FinishReason
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import expected_tokens

V0 = frozenset(ABLATIONS)
V0_CHUNKED = V0 - frozenset(CHUNKING)


def v0(ablations: frozenset[str] = V0, seconds: Any = lambda *_: 1.0, **changes: Any) -> Driver:
    settings = {"max_num_batched_tokens": 64, "enable_prefix_caching": False, **changes}
    return Driver(resolved(ablations=ablations, **settings), seconds)


def decodes_and_prefills(driver: Driver) -> list[tuple[int, int]]:
    """Of each step: slots that computed one token, slots that computed more."""
    return [
        (sum(count == 1 for count in counts.values()), sum(count > 1 for count in counts.values()))
        for counts in driver.worker.slot_tokens
    ]


def test_v0_computes_prompts_whole_and_never_beside_a_decode():
    driver = v0()
    prompts = [[5] * 20, [6] * 30, [7] * 25]
    handles = [driver.add(prompts[0], max_tokens=9)]
    for _ in range(6):
        driver.turn()
        driver.advance()
    handles += [driver.add(prompt, max_tokens=9) for prompt in prompts[1:]]
    driver.run()
    steps = decodes_and_prefills(driver)
    assert not any(decodes and prefills for decodes, prefills in steps)
    assert [n for counts in driver.worker.slot_tokens for n in counts.values() if n > 1] == [20, 30, 25]
    assert (0, 2) in steps, "both late prompts share one step"
    for prompt, handle in zip(prompts, handles, strict=True):
        assert driver.tokens[handle] == expected_tokens(prompt, 9)


def gap_while_a_prompt_of_50_arrives(driver: Driver) -> float:
    """The longest time between two tokens of a running request, when 50 tokens join it."""
    running = driver.add([1], max_tokens=30)
    for _ in range(12):
        if not driver.turn():
            driver.advance()
    driver.add([2] * 50, max_tokens=4)
    driver.run()
    times = driver.times[running]
    return max(after - before for before, after in pairwise(times))


def test_v0_stalls_for_the_whole_prefill_and_v1_for_one_budget_at_most():
    """In simulated time: a step takes 0.1 s and 10 ms a token."""

    def seconds(_message: object, tokens: int) -> float:
        return 0.1 + 0.01 * tokens

    prefill, decode, budget = seconds(None, 50), seconds(None, 2), seconds(None, 16)
    assert gap_while_a_prompt_of_50_arrives(v0(seconds=seconds)) == pytest.approx(prefill + decode)
    v1 = Driver(resolved(enable_prefix_caching=False), seconds)
    assert gap_while_a_prompt_of_50_arrives(v1) == pytest.approx(budget)
    chunked = v0(V0_CHUNKED, seconds, max_num_batched_tokens=16)
    assert gap_while_a_prompt_of_50_arrives(chunked) == pytest.approx(budget)


def test_without_run_ahead_a_step_waits_for_the_one_before():
    driver = v0(frozenset({"no-run-ahead"}))
    driver.add([1, 2], max_tokens=9)
    handed_over = []
    while driver.core.has_work:
        before = len(driver.worker.steps)
        driver.turn()
        handed_over.append(len(driver.worker.steps) - before)
        driver.advance()
    assert max(handed_over) == 1
    assert len(driver.worker.steps) == 9 + 1, "no token was computed in vain; the last step only frees the slot"


def test_whole_state_repeats_every_request_each_step():
    driver = v0(frozenset({"full-state"}))
    handles = [driver.add([i] * 6, max_tokens=8) for i in range(3)]
    driver.run()
    decode = driver.worker.steps[3]
    assert len(decode.assigned_slots) == 3
    assert len(decode.freed_slots) == 3 * 4
    assert len(decode.assigned_slots[0].tokens) == 4 * (6 + 3)
    assert not decode.new_blocks
    for i, handle in enumerate(handles):
        assert driver.tokens[handle] == expected_tokens([i] * 6, 8)


def test_the_watermark_keeps_blocks_free_for_those_who_run():
    settings = {"num_blocks": 201, "max_model_len": 1000, "max_num_batched_tokens": 1000}
    plain, marked = v0(frozenset(), **settings), v0(frozenset({"watermark"}), **settings)
    for driver, running in ((plain, 2), (marked, 1)):
        driver.add([1] * 399, max_tokens=5)  # 100 of 200 blocks
        driver.add([2] * 396, max_tokens=5)  # 99: one block would stay, two must
        driver.turn()
        assert driver.core.scheduler.slots.num_running == running
        driver.run()
        assert len(driver.finished) == 2


def test_v0_refuses_what_no_step_can_hold():
    driver = v0(max_num_batched_tokens=20)
    handle = driver.add([1] * 18, max_tokens=9)
    driver.run()
    assert driver.finished[handle].reason == FinishReason.ERROR
    assert "--max-num-batched-tokens" in driver.finished[handle].error


def test_scheduler_steps_give_tokens_in_bursts_whoever_waits():
    driver = v0(scheduler_steps=4, max_num_seqs=1)
    first, waiting = driver.add([1, 2], max_tokens=13), driver.add([3, 4], max_tokens=5)
    driver.run()
    assert driver.tokens[first] == expected_tokens([1, 2], 13)
    assert driver.tokens[waiting] == expected_tokens([3, 4], 5)
    times = driver.times[first]
    assert [times.count(at) for at in sorted(set(times))] == [1, 4, 4, 4]


def test_priority_goes_first_and_is_preempted_last():
    driver = Driver(resolved(scheduling_policy="priority", max_num_seqs=1))
    handles = [driver.add([i] * 3, max_tokens=3, priority=priority) for i, priority in enumerate((5, 5, 1))]
    driver.run()
    ends = [driver.times[handle][-1] for handle in handles]
    assert ends[2] < ends[0] < ends[1], "sooner by priority, then by arrival"

    driver = Driver(resolved(scheduling_policy="priority", num_blocks=9, max_model_len=32, enable_prefix_caching=False))
    low = driver.add([1] * 7, max_tokens=20, priority=9)
    high = [driver.add([i] * 7, max_tokens=20, priority=0) for i in (2, 3)]
    driver.run()
    assert driver.finished[low].preemptions > 0
    assert driver.finished[high[0]].preemptions == 0
    for i, handle in zip((1, 2, 3), (low, *high), strict=True):
        assert driver.tokens[handle] == expected_tokens([i] * 7, 20)


@pytest.mark.parametrize("ablation", ["no-run-ahead", "full-state"])
def test_without_run_ahead_there_are_no_bursts(ablation: str):
    policy = SchedulingPolicy.from_resolved(resolved(ablations=frozenset({ablation})))
    assert policy.steps_in_flight == 1
    assert policy.bursts.max_steps(1e-6) == 1
