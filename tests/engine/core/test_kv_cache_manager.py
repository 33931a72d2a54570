"""Blocks of slots over KV groups: what windows free, what cached prefixes need, and that nothing else is kept."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import window_blocks
from engine.core.block_pool import NULL_BLOCK
from engine.core.kv_cache_manager import KVCacheManager
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import expected_tokens

SIZE = 4


def make_manager(windows: tuple[int, ...], blocks: int = 64) -> KVCacheManager:
    config = resolved(kv_windows=windows, num_blocks=blocks + 1, max_num_batched_tokens=8)
    return KVCacheManager(config)


def held_by(kv: KVCacheManager, slot: int) -> list[int]:
    """Number of blocks of a slot, by KV group."""
    return [sum(block != NULL_BLOCK for block in table) for table in kv.block_tables[slot]]


def held(driver: Driver) -> list[list[int]]:
    """Number of blocks of each live slot, by KV group."""
    scheduler = driver.core.scheduler
    return [held_by(scheduler.kv, slot) for slot in scheduler.slots.admission_order]


def test_a_window_of_4k_bounds_what_a_context_of_16k_holds() -> None:
    length, window, size, budget = 16384, 4096, 32, 128
    bound = window_blocks(window, budget, size)
    config = resolved(
        max_model_len=length, max_num_batched_tokens=budget, block_size=size, max_num_seqs=2, kv_windows=(0, window),
        num_blocks=length // size + bound + 1,
    )  # fmt: skip
    driver = Driver(config)
    prompt, most = [i % 50 for i in range(length - 200)], [0, 0]
    handle = driver.add(prompt, max_tokens=200)
    while driver.turn() or driver.core.has_work:
        for blocks in held(driver):
            most = [max(pair) for pair in zip(most, blocks, strict=True)]
        driver.advance()
    assert driver.tokens[handle] == expected_tokens(prompt, 200)
    assert driver.stats.preemptions == 0
    assert most[0] == length // size, "layers that see all keep all"
    assert window // size <= most[1] <= bound == 133, "and the others what the window and one step reach"


@pytest.mark.parametrize("ablations", [frozenset(), frozenset({"full-state"}), frozenset({"no-run-ahead"})])
def test_a_pool_of_one_window_serves_any_length(ablations: frozenset[str]) -> None:
    """A model of windows alone needs no more for a long request than for one of the window's length."""
    blocks = window_blocks(12, 16, SIZE) + 1
    config = resolved(kv_windows=(12,), num_blocks=blocks + 1, max_model_len=400, max_num_seqs=1, ablations=ablations)
    driver = Driver(config, lambda *_: 0.001)
    prompt = [i % 7 for i in range(300)]
    handle = driver.add(prompt, max_tokens=90)
    driver.run()
    assert driver.tokens[handle] == expected_tokens(prompt, 90)
    assert driver.stats.preemptions == 0


@pytest.mark.parametrize("windows", [(0,), (12,), (0, 12), (0, 6, 12)])
def test_a_long_prefix_is_found_again(windows: tuple[int, ...]) -> None:
    driver = Driver(resolved(kv_windows=windows, num_blocks=16 * len(windows) + 1))
    prompt = [i % 7 for i in range(40)]
    first = driver.add(prompt, max_tokens=8)
    driver.run()
    again, longer = driver.add(prompt, max_tokens=8), driver.add([*prompt, *driver.tokens[first], 3], max_tokens=4)
    driver.run()
    assert driver.cached[again] == 36
    assert driver.cached[longer] == 44, "the end of the answer is still seen, so it was named when its request ended"
    assert driver.tokens[again] == driver.tokens[first]
    assert driver.tokens[longer] == expected_tokens([*prompt, *driver.tokens[first], 3], 4)


def test_a_window_needs_the_last_blocks_of_a_prefix_only() -> None:
    kv, names = make_manager((0, 8)), [bytes([i]) * 32 for i in range(6)]
    kv.allocate(0, 24, kv.empty_prefix())
    kv.cache_blocks(0, names, 0, 3)
    kv.free_before_window(0, 16)  # where position 9 is the first that is seen
    kv.allocate_window_blocks(0)
    assert held_by(kv, 0) == [6, 4]
    kv.cache_blocks(0, names, 3, 6)
    kv.pool.allocate(kv.pool.num_free)  # all that nobody holds gets other content
    found = kv.find_cached_prefix(names)
    reach = (24 - 8 + 1) // SIZE
    assert found.num_blocks == 6
    assert found.first_blocks == [0, reach]
    assert found.tables[1][:reach] == [NULL_BLOCK] * reach
    assert all(found.tables[1][reach:])
    assert kv.find_cached_prefix(names[:3]).num_blocks == 0, "a shorter prefix needs blocks that are gone"


@st.composite
def chains(draw: Any) -> tuple[tuple[int, ...], int, list[set[int]]]:
    windows = draw(st.sampled_from([(0,), (5,), (0, 5), (3, 9), (0, 4, 9)]))
    length = draw(st.integers(0, 10))
    return windows, length, [draw(st.sets(st.integers(0, 9))) for _ in windows]


@settings(max_examples=300)
@given(chains())
def test_the_longest_prefix_is_found_that_all_groups_have(case: tuple[tuple[int, ...], int, list[set[int]]]) -> None:
    windows, length, cached = case
    kv = make_manager(windows)
    names = [bytes([i]) * 32 for i in range(length)]
    for group, some in enumerate(cached):
        for index in some & set(range(length)):
            kv.pool.cache(kv.pool.allocate(1), [names[index] + (bytes([group]) if group else b"")])

    def suffices(count: int) -> bool:
        for window, some in zip(windows, cached, strict=True):
            first = max(0, count * SIZE - window + 1) // SIZE if window else 0
            if not set(range(first, count)) <= some:
                return False
        return True

    assert kv.find_cached_prefix(names).num_blocks == max(count for count in range(length + 1) if suffices(count))
