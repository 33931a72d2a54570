"""The worked example of docs/life-of-a-request.md is what the scheduler does."""

import numpy as np
import pytest

from engine.columns import column
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.steps import ScheduledStep
from engine.messages import AddRequest, FinishReason, Sampling, StepResult, make_handle
from engine.resolved_config import ResolvedConfig


def request(sequence: int) -> Request:
    prompt = column(range(40))
    made = Request(AddRequest(make_handle(0, sequence), prompt, 12, Sampling()), 64, 0.0)
    made.hash_prompt(16)
    return made


class Example:
    """The page's settings, one step after the other."""

    def __init__(self) -> None:
        config = ResolvedConfig(
            max_model_len=64,
            max_num_seqs=4,
            max_num_batched_tokens=32,
            block_size=16,
            num_blocks=20,
            enable_prefix_caching=True,
        )
        self.scheduler = Scheduler(config)

    def plan(self) -> ScheduledStep:
        plan = self.scheduler.schedule(0.0)
        assert plan is not None
        return plan

    def book(self, plan: ScheduledStep) -> list[int]:
        """Give each sampling slot a token; reasons of the requests that ended."""
        outcome = self.scheduler.update(plan, StepResult(plan.step, column([7] * len(plan.slots))))
        return [one.reason for one in outcome.finished]

    def counts(self, slot: int) -> tuple[int, int, int]:
        slots = self.scheduler.slots
        return int(slots.num_computed_tokens[slot]), int(slots.num_tokens[slot]), int(slots.num_scheduled_tokens[slot])

    def cached(self) -> set[int]:
        return set(self.scheduler.pool.block_of.values())


@pytest.fixture
def example() -> Example:
    return Example()


def test_the_worked_example(example: Example) -> None:
    first = request(0)
    assert len(first.block_hashes) == 2
    example.scheduler.add(first)
    plan = example.plan()
    slot, slots, tables = first.slot, example.scheduler.slots, example.scheduler.kv.block_tables
    assert (plan.num_tokens, example.counts(slot), slots.max_num_tokens[slot]) == (32, (32, 40, 40), 52)
    assert tables[slot] == [[1, 2, 3]]
    assert example.cached() == {1, 2}
    example.book(plan)
    plan = example.plan()
    assert (plan.num_tokens, example.counts(slot)) == (8, (40, 40, 41))
    example.book(plan)
    assert example.counts(slot) == (40, 41, 41)
    plan = example.plan()
    assert (plan.num_tokens, example.counts(slot)) == (1, (41, 41, 42))
    for _ in range(8):
        example.book(plan)
        plan = example.plan()
    assert (example.counts(slot), tables[slot]) == ((49, 49, 50), [[1, 2, 3, 4]])
    for _ in range(2):
        assert example.book(plan) == []
        plan = example.plan()
    assert (example.counts(slot), example.cached()) == ((51, 51, 52), {1, 2})
    assert example.book(plan) == [FinishReason.LENGTH]
    assert example.cached() == {1, 2, 3}
    free = example.scheduler.pool.free_list()
    assert free[0] == 4
    assert free[-3:] == [3, 2, 1]

    second = request(1)
    example.scheduler.add(second)
    plan = example.plan()
    assert plan.num_tokens == 8
    assert example.counts(second.slot) == (40, 40, 41)
    assert tables[second.slot] == [[1, 2, 4]]
    assert np.array_equal(plan.slots, [second.slot])


def test_a_decode_takes_one_token_of_the_budget(example: Example) -> None:
    example.scheduler.add(request(0))
    for _ in range(2):
        example.book(example.plan())
    other = Request(AddRequest(make_handle(0, 1), column(range(100, 140)), 12, Sampling()), 64, 0.0)
    other.hash_prompt(16)
    example.scheduler.add(other)
    assert example.plan().num_tokens == 32
    assert example.counts(other.slot)[0] == 31
