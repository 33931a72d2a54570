"""A core whose evicted blocks stay in host memory and files: the same tokens, and prefixes that are found again."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.core.pipeline_scheduler import PipelineScheduler
from engine.core.pooling_scheduler import make_scheduler
from engine.core.scheduler import Scheduler
from engine.messages import CopyingStep, FinishReason, Utility, UtilityResult, encode
from engine.resolved_config import ResolvedConfig
from tests.engine.core.spill_driver import SpillDriver
from tests.engine.core.test_whatever_happens import Asked, configs, play, requests
from tests.engine.core_driver import resolved
from tests.engine.fake_executor import expected_tokens

BLOCKS = 12


def make(host_blocks: int = 100, disk_blocks: int = 0, **changes: Any) -> SpillDriver:
    settings = {"num_blocks": BLOCKS + 1, "host_blocks": host_blocks, "max_num_seqs": 1, **changes}
    driver = SpillDriver(resolved(**settings), lambda *_: 0.01)
    if disk_blocks:
        driver.use_disk(disk_blocks)
    return driver


def prompt_of(number: int, length: int = 30) -> list[int]:
    return [(7 * number + i) % 50 for i in range(length)]


def serve(driver: SpillDriver, prompt: list[int], max_tokens: int = 6) -> int:
    """Serve one request to its end; returns how many of its tokens were cached."""
    handle = driver.add(prompt, max_tokens)
    driver.run()
    assert driver.tokens[handle] == expected_tokens(prompt, max_tokens)
    return driver.cached[handle]


def test_without_the_flag_the_scheduler_is_the_plain_one() -> None:
    assert type(make_scheduler(resolved(), None)) is Scheduler


@pytest.mark.parametrize("stages", [1, 3])
def test_what_the_pool_evicts_is_found_in_host_memory(stages: int) -> None:
    driver = make(pipeline_stages=stages)
    assert isinstance(driver.scheduler, PipelineScheduler) == (stages > 1)
    for number in range(4):  # each takes most of the pool
        assert serve(driver, prompt_of(number)) == 0
    assert [serve(driver, prompt_of(number)) for number in range(4)] == [28] * 4
    spill = driver.stats.spill
    assert spill is not None
    assert spill.host_hits > 0
    assert spill.lost == 0
    assert spill.host_used == spill.spilled <= spill.host_blocks == 100
    assert driver.stats.prefix_hits == 4 * 28
    assert any(isinstance(message, CopyingStep) and message.block_copies for message in driver.worker.steps)


def test_conversations_go_on_where_they_were() -> None:
    """Three conversations in turns, of which the pool holds one."""
    driver = make()
    texts = [prompt_of(number, 10) for number in range(3)]
    for turn, cached in enumerate((0, 12, 24)):  # whole blocks of what the turns before computed
        for number, text in enumerate(texts):
            assert serve(driver, text) == cached
            text += [*expected_tokens(text, 6), number, turn, 3]


def test_a_full_host_tier_forgets_the_least_recently_used() -> None:
    driver = make(host_blocks=9)
    for number in range(4):
        serve(driver, prompt_of(number))
    assert serve(driver, prompt_of(0)) == 0
    assert serve(driver, prompt_of(3)) > 0


def test_files_hold_what_host_memory_can_not() -> None:
    driver = make(host_blocks=18, disk_blocks=100)
    for number in range(5):
        serve(driver, prompt_of(number))
        driver.settle()
    found = []
    for number in range(4):
        found.append(serve(driver, prompt_of(number)))
        driver.settle()
    assert found == [28] * 4
    spill = driver.stats.spill
    assert spill is not None
    assert spill.disk_read >= spill.disk_hits > 0
    assert spill.disk_faults == 0
    assert spill.disk_written == len(driver.files.contents) == spill.disk_used


def test_a_broken_file_is_removed_and_its_block_computed_again(caplog: pytest.LogCaptureFixture) -> None:
    driver = make(host_blocks=18, disk_blocks=100)
    for number in range(5):
        serve(driver, prompt_of(number))
        driver.settle()
    driver.files.fails = lambda: True
    files = len(driver.files.contents)
    assert serve(driver, prompt_of(0)) == 0
    driver.files.fails = lambda: False
    driver.settle()
    assert len(driver.files.contents) < files
    assert driver.tiers.stats().disk_faults > 0
    assert "the file is broken: its tokens are computed again" in caplog.text
    for number in range(1, 5):
        serve(driver, prompt_of(number))
        driver.settle()
    assert serve(driver, prompt_of(0)) == 28, "it was spilled and written anew"


def test_a_disk_that_can_not_be_written_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    driver = make(host_blocks=100, disk_blocks=100)
    driver.files.fails = lambda: True
    for number in range(3):
        serve(driver, prompt_of(number))
        driver.settle()
    assert serve(driver, prompt_of(0)) == 28
    assert caplog.text.count("the disk is full: blocks stay in host memory only") == 1
    assert driver.tiers.stats().disk_written == 0


def test_a_request_that_waits_for_a_file_lets_others_pass() -> None:
    driver = make(host_blocks=18, disk_blocks=100, max_num_seqs=2)
    for number in range(5):
        serve(driver, prompt_of(number))
        driver.settle()
    driver.luck = Random(0)
    driver.luck.randint = lambda *_: 0  # type: ignore[method-assign]  # the disk does not answer
    waits = driver.add(prompt_of(0), 6)
    passes = driver.add([1, 2, 3], 2)
    for _ in range(40):
        driver.turn()
        driver.advance()
    assert passes in driver.finished
    assert waits not in driver.cached
    assert driver.scheduler.has_work
    assert len(driver.scheduler.waiting) == 1
    driver.luck = None
    driver.run()
    assert driver.cached[waits] == 28


def test_a_request_that_waits_for_a_file_can_be_aborted() -> None:
    driver = make(host_blocks=18, disk_blocks=100)
    for number in range(5):
        serve(driver, prompt_of(number))
        driver.settle()
    handle = driver.add(prompt_of(0), 6)
    driver.turn()
    assert len(driver.scheduler.waiting) == 1
    driver.abort(handle)
    driver.run()
    assert driver.finished[handle].reason == FinishReason.ABORT
    driver.settle()
    assert serve(driver, prompt_of(0)) == 28


def test_resetting_the_prefix_cache_empties_all_tiers() -> None:
    driver = make(host_blocks=18, disk_blocks=100)
    for number in range(4):
        serve(driver, prompt_of(number))
        driver.settle()
    cached = len({*driver.scheduler.pool.block_of, *driver.tiers.host.block_of, *driver.files.contents})
    driver.core.receive(encode(Utility(0, 1, "reset_prefix_cache")))
    driver.turn()
    driver.settle()
    assert [one.result for one in driver.messages if isinstance(one, UtilityResult)] == [cached]
    assert not driver.files.contents
    assert [serve(driver, prompt_of(number)) for number in range(2)] == [0, 0]


# ------------------------------------------------------------------------------------------------ whatever happens


@st.composite
def spill_configs(draw: Any) -> tuple[ResolvedConfig, int]:
    """A configuration with host blocks, and the number of files."""
    config = draw(configs(drafts=True))
    host_blocks = draw(st.sampled_from([1, 2, 5, 12, 60]))
    stages, ablations = draw(st.sampled_from([1, 1, 3])), config.ablations
    if stages > 1:
        config, ablations = replace(config, scheduler_steps=1), ablations - {"full-state", "driver-broadcast"}
    changed = replace(
        config, host_blocks=host_blocks, enable_prefix_caching=True, ablations=ablations, pipeline_stages=stages
    )
    return changed, draw(st.sampled_from([0, 0, 1, 4, 100]))


@settings(max_examples=200, deadline=None)
@given(
    requests, requests, spill_configs(), st.sampled_from([0.001, 1.0]), st.lists(st.booleans(), max_size=30),
    st.randoms(), st.booleans(),
)  # fmt: skip
def test_each_request_gets_its_own_tokens(
    first: list[Asked], second: list[Asked], config: tuple[ResolvedConfig, int], step_s: float, eager: list[bool],
    luck: Random, faults: bool,
) -> None:  # fmt: skip
    resolved_config, disk_blocks = config
    driver = SpillDriver(resolved_config, lambda *_: step_s)
    if disk_blocks:
        driver.use_disk(disk_blocks)
        driver.luck = luck
    if faults:
        driver.files.fails = lambda: luck.random() < 0.3
        driver.worker.fails = lambda: luck.random() < 0.2
    for some in (first, second, first):
        handles = play(driver, some, eager)
        for asked, handle in zip(some, handles, strict=True):
            expected, got, end = asked.expected(), driver.tokens[handle], driver.finished[handle]
            if end.reason in (FinishReason.ABORT, FinishReason.NOT_ENCODED):
                assert got == expected[: len(got)]
            else:
                assert got == expected
    spill = driver.tiers.stats()
    event(f"host hits: {spill.host_hits > 0}, disk hits: {spill.disk_hits > 0}, lost: {spill.lost > 0}")
    event(f"preempted: {driver.stats.preemptions > 0}, broken files: {spill.disk_faults > 0}")
    driver.luck = None
    driver.settle()
    for block in driver.tiers.host.block_of.values():
        assert b"fault" not in driver.worker.host[block], "content of a failed input is found again"
    if driver.tiers.disk is not None:
        for key in driver.tiers.disk.keys:
            assert b"fault" not in driver.files.contents[key]
    assert driver.scheduler.pool.num_free == resolved_config.num_blocks - 1, "every block came back"
    assert not driver.scheduler.requests


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=6, max_size=25), st.sampled_from([8, 12, 20]), st.sampled_from([6, 100]),
    st.sampled_from([(0,), (9,), (0, 9)]), st.booleans(), st.booleans(), st.randoms(),
)  # fmt: skip
def test_prompts_that_come_back_through_all_tiers(
    numbers: list[int], host_blocks: int, disk_blocks: int, windows: tuple[int, ...], faults: bool, together: bool,
    luck: Random,
) -> None:  # fmt: skip
    """Few prompts, each of which takes most of the pool, so that blocks often go to files and back."""
    groups = len(windows)
    driver = make(host_blocks * groups, disk_blocks * groups, num_blocks=BLOCKS * groups + 1, kv_windows=windows)
    if faults:
        driver.files.fails = lambda: luck.random() < 0.2
    handles = []
    for number in numbers:
        handles.append((number, driver.add(prompt_of(number), 6)))
        if not together:
            driver.run()
            driver.settle()
    driver.luck = luck if together else None
    driver.run()
    for number, handle in handles:
        assert driver.tokens[handle] == expected_tokens(prompt_of(number), 6)
    spill = driver.tiers.stats()
    if not faults and not together and disk_blocks == 100 and host_blocks == 20:  # half of it holds a prompt
        seen: set[int] = set()
        for number, handle in handles:
            assert driver.cached[handle] == (28 if number in seen else 0), "all is found, wherever it went"
            seen.add(number)
    event(f"host hits: {spill.host_hits > 0}, disk hits: {spill.disk_hits > 0}, broken: {spill.disk_faults > 0}")
