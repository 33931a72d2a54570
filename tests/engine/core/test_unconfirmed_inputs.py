"""An input that can't be encoded ends the requests that are computed with it, and nothing else."""

from collections.abc import Callable

import pytest

from engine.columns import column
from engine.core.request import Request
from engine.core.unconfirmed_inputs import UnconfirmedInputs
from engine.messages import AddRequest, FinishReason, MMInputRef, Sampling
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import expected_tokens

PICTURE, OTHER = MMInputRef(b"aa", 2, 4), MMInputRef(b"bb", 2, 4)
START = [1, 2, 7, 7, 7, 7, 3, 4]  # two blocks
CAUSE = "multimodal input 0 could not be encoded: the tower fails"


def failing(driver: Driver, *numbers: int) -> None:
    """The encoder fails for the inputs with these numbers, in the order in which they are encoded."""
    worker = driver.worker
    worker.fails = lambda: len(worker.encoded) - 1 in numbers


def advance(driver: Driver, until: Callable[[], bool]) -> None:
    for _ in range(50):
        driver.turn()
        if until():
            return
        driver.advance()
    raise AssertionError("that does not happen")


def check_clean(driver: Driver) -> None:
    scheduler = driver.core.scheduler
    assert not [block for block in scheduler.pool.block_of.values() if driver.worker.has_fault(block)]
    assert not scheduler.encoder_cache.cache.references
    assert not driver.worker.faulty & set(scheduler.encoder_cache.cache.size_of)
    assert scheduler.pool.num_free == 64
    assert not scheduler.requests


@pytest.mark.parametrize("ablations", [(), ("no-run-ahead",), ("full-state",), ("no-encoder-cache",)])
def test_only_the_requests_with_the_input_end_and_a_retry_is_computed_anew(ablations: tuple[str, ...]):
    driver = Driver(resolved(ablations=frozenset(ablations), max_num_batched_tokens=40))
    failing(driver, 0)
    running = driver.add([5] * 9, max_tokens=8)
    driver.turn()
    wrong = driver.add([*START, 9, 9], mm_inputs=(PICTURE,))
    right = driver.add([*START, 9, 9], mm_inputs=(OTHER,))
    driver.run()
    assert driver.finished[wrong].reason == FinishReason.NOT_ENCODED
    assert driver.finished[wrong].error == CAUSE
    assert driver.tokens[wrong] == []
    assert driver.tokens[running] == expected_tokens([5] * 9, 8)
    assert driver.tokens[right] == expected_tokens([*START, 9, 9], 8, mm_inputs=(OTHER,))
    check_clean(driver)
    again = driver.add([*START, 9, 9], mm_inputs=(PICTURE,))
    driver.run()
    assert driver.tokens[again] == expected_tokens([*START, 9, 9], 8, mm_inputs=(PICTURE,))
    assert driver.cached[again] == 0, "blocks with zeros were found"
    check_clean(driver)


def test_a_request_that_found_the_input_in_the_prefix_cache_ends_too():
    """It is admitted while the step that encodes the input runs, and has no placeholder to compute itself."""
    driver = Driver(resolved(max_num_batched_tokens=9))
    failing(driver, 0)
    wrong = driver.add([*START, 9], max_tokens=1, mm_inputs=(PICTURE,))
    driver.turn()
    second = driver.add([*START, 8, 8], mm_inputs=(PICTURE,))
    text = driver.add([1, 1, 1])
    driver.turn()  # the next step is scheduled before the result of the first one is booked
    assert driver.worker.steps[-1].assigned_slots[0].num_computed_tokens == 8
    assert not driver.finished, "the result of the first step was booked"
    driver.run()
    assert {driver.finished[handle].error for handle in (wrong, second)} == {CAUSE}
    assert driver.tokens[text] == expected_tokens([1, 1, 1], 8)
    check_clean(driver)


def test_blocks_of_a_request_that_is_aborted_meanwhile_are_not_reused():
    driver = Driver(resolved(max_num_batched_tokens=9))
    failing(driver, 0)
    wrong = driver.add([*START, 9], mm_inputs=(PICTURE,))
    driver.turn()
    driver.abort(wrong)
    second = driver.add([*START, 8, 8], mm_inputs=(PICTURE,))
    driver.run()
    assert driver.finished[wrong].reason == FinishReason.ABORT
    expected = expected_tokens([*START, 8, 8], 8, mm_inputs=(PICTURE,))
    assert driver.tokens[second] == expected or driver.finished[second].error == CAUSE
    third = driver.add([*START, 8, 8], mm_inputs=(PICTURE,))
    driver.run()
    assert driver.tokens[third] == expected
    check_clean(driver)


def test_a_request_that_computed_the_input_earlier_goes_on():
    """Its embeddings were evicted meanwhile, and another request's attempt to encode the same input fails."""
    driver = Driver(resolved(max_num_batched_tokens=12, encoder_cache_tokens=4))
    failing(driver, 2)
    earlier = driver.add([*START, 9], max_tokens=30, mm_inputs=(PICTURE,))
    advance(driver, lambda: bool(driver.tokens[earlier]))
    driver.add([*START, 9], max_tokens=1, mm_inputs=(OTHER,))
    advance(driver, lambda: len(driver.worker.encoded) == 2)
    wrong = driver.add([6, *START[1:]], mm_inputs=(PICTURE,))
    driver.run()
    assert driver.finished[wrong].error == CAUSE
    assert driver.tokens[earlier] == expected_tokens([*START, 9], 30, mm_inputs=(PICTURE,))
    check_clean(driver)


@pytest.mark.parametrize(("joint", "first", "hit_depends"), [(False, 10, False), (True, 3, True)])
def test_tokens_of_joint_inputs_depend_on_the_later_ones(joint: bool, first: int, hit_depends: bool):
    refs = tuple(MMInputRef(name, at, 4, joint, joint=joint) for name, at in ((b"a", 3), (b"b", 10)))
    one, other = (Request(AddRequest(n, column([7] * 20), 1, Sampling(), mm_inputs=refs), 99, 0.0) for n in (1, 2))
    unconfirmed = UnconfirmedInputs()
    unconfirmed.add(b"b")
    unconfirmed.use(one, 3, 20)
    unconfirmed.use(other, 0, 8)  # a prefix hit that ends between them
    unconfirmed.end_step()
    assert set(unconfirmed.failures(["no memory"])) == ({1, 2} if hit_depends else {1})
    assert unconfirmed.leave(one) == first
    assert unconfirmed.leave(one) is None


def test_the_error_names_the_input_by_its_place_in_the_prompt():
    driver = Driver(resolved(max_num_batched_tokens=12))
    failing(driver, 1)
    two = (OTHER, MMInputRef(b"aa", 6, 2))
    wrong = driver.add([1, 2, 7, 7, 7, 7, 7, 7, 3], mm_inputs=two)
    driver.run()
    assert driver.finished[wrong].error == "multimodal input 1 could not be encoded: the tower fails"
    check_clean(driver)
