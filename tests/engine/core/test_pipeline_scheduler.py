"""Pipeline stages: no slot decodes before its token is known, and slots are divided so that all stages work."""

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.core.grammars import GrammarManager
from engine.core.pipeline_scheduler import PipelineScheduler
from engine.frontend.grammar_vocabulary import GrammarVocabulary
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.grammar import Grammar
from engine.messages import FinishReason
from engine.resolved_config import ResolvedConfig
from tests.engine.core.test_whatever_happens import Asked, configs, play, requests
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import VOCABULARY, FakeExecutor, expected_tokens


class StagedExecutor(FakeExecutor):
    """Fails if a step computes a slot whose newest token no result has delivered."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.most_in_flight = 0
        self._sampled_in: dict[int, tuple[int, int]] = {}  # by slot: the generation, and the step

    def submit(self, step: bytes) -> Future[None]:
        undelivered = set(self._sampled)
        done = super().submit(step)
        self.most_in_flight = max(self.most_in_flight, len(self._sampled))
        message = self.steps[-1]
        assert message.num_steps == 1, "a burst"
        for number in self.slot_tokens[-1]:
            generation, sampled = self._sampled_in.get(number, (-1, -1))
            assert generation != self.slots[number].generation or sampled not in undelivered, (
                f"step {message.step} computes slot {number} before the result of step {sampled} is known"
            )
        for number in self._owners[message.step]:
            self._sampled_in[number] = self.slots[number].generation, message.step
        return done


@st.composite
def staged(draw: Any) -> ResolvedConfig:
    config = draw(configs(drafts=True))
    ablations = config.ablations - {"full-state", "driver-broadcast"}
    stages = draw(st.sampled_from([2, 3, 5]))
    return replace(config, pipeline_stages=stages, ablations=ablations, scheduler_steps=1)


@settings(max_examples=300, deadline=None)
@given(requests, staged(), st.sampled_from([0.001, 0.004, 1.0]), st.lists(st.booleans(), max_size=30))
def test_each_request_gets_its_own_tokens(
    requests: list[Asked], config: ResolvedConfig, step_s: float, eager: list[bool]
) -> None:
    driver = Driver(config, lambda *_: step_s, StagedExecutor)
    handles = play(driver, requests, eager)
    for asked, handle in zip(requests, handles, strict=True):
        expected, got, end = asked.expected(), driver.tokens[handle], driver.finished[handle]
        if end.reason == FinishReason.ABORT:
            assert got == expected[: len(got)]
        else:
            assert got == expected
    worker = driver.worker
    assert isinstance(worker, StagedExecutor)
    event(f"preempted: {driver.stats.preemptions > 0}, found a prefix: {driver.stats.prefix_hits > 0}")
    event(f"in flight: {worker.most_in_flight} with {config.pipeline_stages} stages")
    assert worker.most_in_flight <= config.most_steps_in_flight
    assert driver.core.scheduler.pool.num_free == config.num_blocks - 1, "every block came back"
    assert not driver.core.scheduler.requests
    scheduler = driver.core.scheduler
    assert isinstance(scheduler, PipelineScheduler)
    assert not scheduler._decoding_steps


def decodes(driver: Driver) -> list[list[int]]:
    """The slots of each step in which no prompt was computed."""
    return [sorted(one) for one in driver.worker.slot_tokens if one and set(one.values()) == {1}]


@pytest.mark.parametrize(("stages", "slots"), [(2, 4), (3, 3), (2, 5), (4, 2)])
def test_slots_that_decode_are_divided_over_the_stages(stages: int, slots: int) -> None:
    config = resolved(pipeline_stages=stages, max_num_seqs=slots, max_num_batched_tokens=8 * slots, num_blocks=200)
    driver = Driver(config, lambda *_: 0.01, StagedExecutor)
    prompts = [[slot + 1, 2, 3] for slot in range(slots)]
    handles = [driver.add(prompt, 30) for prompt in prompts]
    driver.run()
    for handle, prompt in zip(handles, prompts, strict=True):
        assert driver.tokens[handle] == expected_tokens(prompt, 30)
    steps = decodes(driver)
    share = -(-slots // stages)
    assert max(map(len, steps)) == share
    full = steps[: 20 * min(stages, slots)]  # before the first request ends
    turns = [sum(slot in step for step in full) for slot in range(slots)]
    assert max(turns) - min(turns) <= 1, f"slots take turns, but had {turns}"
    assert min(map(len, full)) >= slots // stages or slots < stages


def test_chunks_of_a_prompt_follow_each_other_at_once() -> None:
    """They need no token of a step in flight, so each stage has one, and another one waits."""
    driver = Driver(resolved(pipeline_stages=3), lambda *_: 0.001, StagedExecutor)
    handle = driver.add(list(range(1, 57)), 3)
    driver.turn()
    worker = driver.worker
    assert isinstance(worker, StagedExecutor)
    assert [sum(one.values()) for one in worker.slot_tokens] == [16, 16, 16, 8]
    assert worker.most_in_flight == 4
    driver.run()
    assert driver.tokens[handle] == expected_tokens(range(1, 57), 3)


def test_a_step_is_scheduled_at_once_for_an_idle_stage() -> None:
    """Also while a long step runs, behind which the next one would otherwise wait."""
    config = resolved(pipeline_stages=2, max_num_batched_tokens=64)
    driver = Driver(config, lambda *_: 1.0, StagedExecutor)
    for first in range(1, 5):
        driver.add([first, 2, 3], 40)
    for _ in range(12):  # durations are known by then
        driver.turn()
        driver.advance()
    driver.turn()
    assert len(driver.core._in_flight) == 2, "each stage has a step"


def test_masks_do_not_wait_for_the_steps_of_other_slots() -> None:
    """The tokens of a slot are known when it decodes, so its mask can be made while other steps are in flight."""
    manager = GrammarManager(lambda: GrammarVocabulary(Tokenizer(StandInBackend(VOCABULARY)), VOCABULARY), lambda: None)
    driver = Driver(resolved(pipeline_stages=2), lambda *_: 0.01, StagedExecutor, manager)
    worker = driver.worker
    assert isinstance(worker, StagedExecutor)
    worker.obeys_masks = True
    bits = Grammar("regex", "[01]{20}")
    assert manager.check(bits.kind, bits.text).result(60).cause == ""
    handles = [driver.add([first, 2, 3], 12, grammar=bits) for first in range(1, 5)]
    driver.run()
    manager.close()
    for handle in handles:
        assert driver.finished[handle].reason == FinishReason.LENGTH
        assert len(driver.tokens[handle]) == 12
        assert set(driver.tokens[handle]) <= {ord("0"), ord("1")}
    assert worker.most_in_flight >= 2
