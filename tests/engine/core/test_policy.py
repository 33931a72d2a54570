"""Each object of a scheduling policy alone, and which ones an engine gets."""

from dataclasses import fields

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.columns import column
from engine.config import ABLATIONS, CHUNKING, watermark_blocks
from engine.core.policy import (
    BURST_S,
    MAX_BURST,
    ChunkedPrefill,
    Chunks,
    FirstComeFirstServed,
    FixedBursts,
    LatencyBoundBursts,
    MixedBatches,
    PrefillFirst,
    PriorityOrder,
    SchedulingPolicy,
    Watermark,
    WholePrompts,
)
from engine.core.request import Request
from engine.core.slots import Slots
from engine.messages import AddRequest, Sampling, make_handle
from tests.engine.core_driver import resolved

BUDGET = 16


class RecordingScheduler:
    """Notes what a batch order asks for; two slots decode, and prefills take the given tokens of the budget."""

    max_num_batched_tokens = BUDGET

    def __init__(self, prefill: int = 0, preempts: bool = False):
        self.calls: list[tuple[str, int]] = []
        self._prefill = prefill
        self._preempts = preempts

    def allocate_window_blocks(self) -> bool:
        self.calls.append(("windows", 0))
        return False

    def allocate_decode_blocks(self) -> bool:
        self.calls.append(("blocks", 0))
        return self._preempts

    def schedule_decodes(self) -> NDArray[np.intp]:
        self.calls.append(("decodes", 0))
        return np.array([0, 1])

    def continue_prefills(self, budget: int, chunks: Chunks) -> int:
        self.calls.append(("prefills", budget))
        if self._prefill:
            chunks.append((2, self._prefill))
        return budget - self._prefill

    def admit_waiting(self, budget: int, chunks: Chunks, now: float) -> None:
        self.calls.append(("admit", budget))


def request(sequence: int, priority: int = 0) -> Request:
    message = AddRequest(make_handle(0, sequence), column([1, 2]), 3, Sampling(), priority=priority)
    return Request(message, 100, float(sequence))


def test_mixed_batches_spend_one_budget_on_decodes_then_prefills_then_waiting_requests():
    scheduler, chunks = RecordingScheduler(prefill=5), Chunks()
    assert MixedBatches().schedule_batch(scheduler, chunks, 0.0).tolist() == [0, 1]
    assert scheduler.calls == [("windows", 0), ("blocks", 0), ("decodes", 0), ("prefills", 14), ("admit", 9)]
    assert chunks == [(2, 5)]


def test_after_a_preemption_no_request_is_admitted():
    scheduler = RecordingScheduler(preempts=True)
    MixedBatches().schedule_batch(scheduler, [], 0.0)
    assert scheduler.calls[-1] == ("prefills", 14)


def test_prefill_first_decodes_only_without_prefills():
    scheduler = RecordingScheduler(prefill=5)
    assert PrefillFirst().schedule_batch(scheduler, [], 0.0).tolist() == []
    assert scheduler.calls == [("windows", 0), ("prefills", BUDGET), ("admit", BUDGET - 5)]
    scheduler = RecordingScheduler()
    assert PrefillFirst().schedule_batch(scheduler, [], 0.0).tolist() == [0, 1]
    assert scheduler.calls[-2:] == [("blocks", 0), ("decodes", 0)]


@pytest.mark.parametrize(("num_owed", "num_possible", "chunked", "whole"), [(9, 9, 9, 9), (9, 4, 4, 0), (9, 0, 0, 0)])
def test_chunks_are_as_large_as_possible_or_all_of_a_prompt(num_owed: int, num_possible: int, chunked: int, whole: int):
    assert ChunkedPrefill().chunk_size(num_owed, num_possible) == chunked
    assert WholePrompts().chunk_size(num_owed, num_possible) == whole


def test_bursts_end_within_the_latency_bound():
    bursts = LatencyBoundBursts()
    assert [bursts.max_steps(step_s) for step_s in (0.0, BURST_S / 100, BURST_S / 3.5, 1.0)] == [1, MAX_BURST, 3, 1]
    assert not bursts.although_requests_wait
    assert not bursts.results_together


def test_fixed_bursts_depend_on_nothing():
    assert [FixedBursts(4).max_steps(step_s) for step_s in (0.0, 1e-6, 1.0)] == [4, 4, 4]
    assert FixedBursts(4).although_requests_wait
    assert FixedBursts(4).results_together
    assert not FixedBursts(1).results_together


def test_a_watermark_reserves_blocks_only_for_running_requests():
    assert [Watermark(7).num_reserved_blocks(running) for running in (0, 1, 9)] == [0, 7, 7]


def test_the_newest_request_is_preempted_or_the_last_by_priority():
    slots = Slots(4, 16)
    for sequence, priority in enumerate((5, 9, 1)):
        slots.assign(request(sequence, priority), 0)
    assert FirstComeFirstServed().choose_victim(slots) == 2
    assert PriorityOrder().choose_victim(slots) == 1
    slots.free(2)
    slots.free(1)
    assert FirstComeFirstServed().choose_victim(slots) == PriorityOrder().choose_victim(slots) == 0


def test_queues_are_in_order_of_arrival_or_of_priority():
    requests = [request(sequence, priority) for sequence, priority in enumerate((5, 9, 1, 5))]
    for order, expected in ((FirstComeFirstServed(), [0, 1, 2, 3]), (PriorityOrder(), [2, 0, 3, 1])):
        queue = order.make_queue()
        for one in requests:
            queue.append(one)
        assert [queue.popleft().handle for _ in requests] == expected
        queue.append(requests[1])
        queue.appendleft(requests[0])
        assert [one.handle for one in queue] == [0, 1], "a preempted request returns to the front"


def test_v1_and_what_each_ablation_replaces():
    v1 = SchedulingPolicy.from_resolved(resolved())
    assert [type(getattr(v1, field.name)) for field in fields(v1)][:5] == [
        MixedBatches, ChunkedPrefill, LatencyBoundBursts, Watermark, FirstComeFirstServed,
    ]  # fmt: skip
    assert (v1.watermark.num_blocks, v1.steps_in_flight, v1.full_state) == (0, 2, False)
    replaced = {
        "no-chunking": {"chunking": WholePrompts},
        "prefill-first": {"batch_order": PrefillFirst},
        "no-run-ahead": {"bursts": FixedBursts, "steps_in_flight": 1},
        "full-state": {"bursts": FixedBursts, "steps_in_flight": 1, "full_state": True},
        "watermark": {"watermark": Watermark(10)},
    }
    for name in ABLATIONS:
        policy = SchedulingPolicy.from_resolved(resolved(num_blocks=1001, ablations=frozenset({name})))
        for field in fields(v1):
            found, expected = getattr(policy, field.name), replaced.get(name, {}).get(field.name)
            if expected is None:
                expected = getattr(v1, field.name)
            expected_type = expected if isinstance(expected, type) else type(expected)
            assert type(found) is expected_type, (name, field.name)
            if isinstance(found, int | Watermark):
                assert found == expected, (name, field.name)


def test_v0_replaces_everything_and_may_keep_chunks_and_several_steps():
    config = {"num_blocks": 1001, "scheduler_steps": 4}
    v0 = SchedulingPolicy.from_resolved(resolved(ablations=frozenset(ABLATIONS), **config))
    assert isinstance(v0.batch_order, PrefillFirst)
    assert isinstance(v0.chunking, WholePrompts)
    assert v0.bursts.max_steps(1.0) == 4
    assert v0.watermark == Watermark(watermark_blocks(1001)) == Watermark(10)
    assert (v0.steps_in_flight, v0.full_state) == (1, True)
    chunked = SchedulingPolicy.from_resolved(resolved(ablations=frozenset(ABLATIONS) - frozenset(CHUNKING)))
    assert isinstance(chunked.batch_order, MixedBatches)
    assert isinstance(chunked.chunking, ChunkedPrefill)


def test_priority_and_draft_tokens_are_options_of_v1():
    policy = SchedulingPolicy.from_resolved(resolved(scheduling_policy="priority", draft_tokens=3))
    assert isinstance(policy.queue_order, PriorityOrder)
    assert isinstance(policy.bursts, FixedBursts)
    assert policy.bursts.max_steps(1e-6) == 1
    assert policy.steps_in_flight == 2
