"""Two ranks that receive only step messages have the same slots as the scheduler after each message."""

from concurrent.futures import Future
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.columns import int32s
from engine.config import ABLATIONS
from engine.core.block_pool import NULL_BLOCK
from engine.core.scheduler import Scheduler
from engine.messages import decode_result, decode_step
from engine.worker.slots import WorkerSlots
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import FakeExecutor

RANKS = 2


class Replaying(FakeExecutor):
    """Applies each message to real worker slots, and compares them with the scheduler's."""

    scheduler: Scheduler
    ranks: list[WorkerSlots]
    compared = 0

    def follow(self, scheduler: Scheduler) -> None:
        config = scheduler.config
        self.scheduler = scheduler
        shape = config.max_num_seqs, config.max_model_len, config.block_size
        self.ranks = [WorkerSlots(*shape, num_groups=len(config.kv_windows)) for _ in range(RANKS)]

    def submit(self, step: bytes) -> "Future[None]":
        done = super().submit(step)
        message = decode_step(step)
        for rank in self.ranks:
            for one in (message, *message.later_steps()):
                batch = rank.begin_step(one)
                rank.append_tokens(batch.sampling, int32s(decode_result(self._sampled[one.step]).tokens))
            self._compare(rank)
        return done

    def _compare(self, rank: WorkerSlots) -> None:
        slots = self.scheduler.slots
        live = np.flatnonzero(rank.live)
        if not self.scheduler.policy.full_state:
            assert np.array_equal(rank.live, slots.live)
        assert np.array_equal(rank.generation[live], slots.generation[live])
        assert np.array_equal(rank.num_computed_tokens[live], slots.num_computed_tokens[live])
        assert np.array_equal(rank.num_tokens[live], slots.num_scheduled_tokens[live])
        for slot in live.tolist():
            known = int(slots.num_tokens[slot])
            assert np.array_equal(rank.tokens[slot, :known], slots.tokens[slot, :known])
            for group, table in enumerate(self.scheduler.kv.block_tables[slot]):
                held = rank.block_tables[group, slot, : rank.num_blocks[group, slot]].tolist()
                assert len(held) == len(table)
                # What a window has left is nobody's business: the scheduler forgets it, a worker doesn't.
                assert all(block in (mine, NULL_BLOCK) for mine, block in zip(held, table, strict=True))
            self.compared += 1


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=20),
        st.integers(1, 12),
        st.sets(st.integers(0, 49), max_size=6),
        st.one_of(st.none(), st.integers(0, 12)),  # aborted that many turns later
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(
    requests,
    st.sampled_from([frozenset(), frozenset(ABLATIONS), frozenset({"full-state"}), frozenset({"prefill-first"})]),
    st.sampled_from([0.001, 1.0]),
    st.booleans(),
    st.sampled_from([(0,), (5,), (0, 3), (0, 3, 3)]),
)
def test_replaying_the_messages_rebuilds_the_table(
    requests: list[Any], ablations: frozenset[str], step_s: float, caching: bool, windows: tuple[int, ...]
):
    config = resolved(
        num_blocks=10 * len(windows) + 1,
        kv_windows=windows,
        max_model_len=32,
        max_num_batched_tokens=40,
        enable_prefix_caching=caching,
        ablations=ablations,
    )
    driver = Driver(config, lambda *_: step_s, Replaying)
    worker = driver.worker
    assert isinstance(worker, Replaying)
    worker.follow(driver.core.scheduler)
    handles = [driver.add(prompt, max_tokens, tuple(stops)) for prompt, max_tokens, stops, _ in requests]
    turn = 0
    while driver.core.has_work:
        for handle, (*_, abort) in zip(handles, requests, strict=True):
            if abort == turn:
                driver.abort(handle)
        if not driver.turn():
            driver.advance()
        turn += 1
    assert worker.compared >= RANKS or all(abort == 0 for *_, abort in requests)
    assert len(driver.finished) == len(requests)
