"""`make bench-core` measures what it says: its cells hold still, and the sizes it reports keep their promise."""

import numpy as np
import pytest

from engine.messages import decode_step
from tests.perf import core_cells as cells
from tests.perf.bench_core import mean_interval, student95


@pytest.mark.parametrize("together", [False, True])
def test_a_cell_measures_nothing_but_decodes(together: bool):
    steps = 2 * cells.ROUND_STEPS
    cell = cells.DecodeCell(32, True, together, steps)
    seen = []
    submit = cell.metered.worker.submit
    cell.metered.worker.submit = lambda step: seen.append(decode_step(step)) or submit(step)  # type: ignore[method-assign]
    for _ in range(2):
        cell.round()
    samples = cell.samples
    assert len(samples.step_ns) == len(samples.loop_ns) == len(samples.client_message_bytes) == steps
    assert not any(message.freed_slots or message.assigned_slots or message.chunks for message in seen)
    taken = [len(message.unpack_new_blocks()) for message in seen]
    assert sum(taken) == 32 * steps // cells.BLOCK_SIZE
    assert max(taken) == (32 if together else 2), "all slots at once, or 32 slots spread over 16 steps"
    cell.metered.core.scheduler.check()


def test_a_step_message_for_a_thousand_rows_stays_below_a_kilobyte():
    cell = cells.DecodeCell(1024, True, False, cells.ROUND_STEPS)
    cell.round()
    assert max(cell.samples.step_message_bytes) <= 1000


def test_nothing_is_found_in_the_cache_where_that_is_claimed():
    serving = cells.ServingCell(4, True)
    serving.batch()
    scheduler = serving._metered.core.scheduler
    assert scheduler.counters.prefix_queries == 8 * serving.INPUT
    assert scheduler.counters.prefix_hits == 0
    assert scheduler.counters.generation_tokens == 8 * serving.OUTPUT
    assert len(scheduler.pool.block_of) > 0.9 * scheduler.pool.num_blocks, "and the pool is full of what can't be found"


def test_a_full_pool_makes_every_admitted_block_an_eviction():
    one = cells.admission(256, True, True, 8)
    assert one.message_bytes > 4 * 256, "the prompt travels with the step"
    assert min(one.schedule, one.receive, one.hashing) > 0


def test_intervals_are_those_of_student():
    assert student95(5) == pytest.approx(2.571, rel=3e-3)
    assert student95(11) == pytest.approx(2.201, rel=1e-3)
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (mean, high - mean) == (3.5, pytest.approx(mean - low))
    assert high - mean == pytest.approx(2.571 * np.std([1, 2, 3, 4, 5, 6], ddof=1) / 6**0.5, rel=3e-3)
