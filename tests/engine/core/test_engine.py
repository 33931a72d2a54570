"""The core against a fake worker: whatever happens, each request gets the tokens it would get alone."""

import logging

import pytest

from engine.columns import column
from engine.errors import RequestError
from engine.messages import (
    AddRequest,
    FinishReason,
    Outputs,
    Sampling,
    Shutdown,
    Utility,
    UtilityResult,
    encode,
    make_handle,
)
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import expected_tokens


def test_one_request_gets_its_tokens_and_ends_by_length():
    driver = Driver()
    handle = driver.add([1, 2, 3, 4, 5], max_tokens=6)
    driver.run()
    assert driver.tokens[handle] == expected_tokens([1, 2, 3, 4, 5], 6)
    assert driver.finished[handle].reason == FinishReason.LENGTH
    assert driver.core.scheduler.pool.num_free == 64


def test_a_stop_id_ends_the_request_and_drops_the_step_in_flight():
    output = expected_tokens([7, 7], 20)
    stop = output[3]
    driver = Driver()
    handle = driver.add([7, 7], max_tokens=20, stop_ids=(stop,))
    driver.run()
    assert driver.tokens[handle] == output[: output.index(stop) + 1]
    assert driver.finished[handle].reason == FinishReason.STOP
    assert driver.finished[handle].stop_id == stop
    computed = sum(driver.worker.batch_tokens)
    assert computed == 2 + len(driver.tokens[handle]), "exactly one token past the stop was computed"


def test_more_stop_ids_than_the_table_has_columns():
    output = expected_tokens([9], 20)
    others = tuple(token for token in range(50) if token not in output)[:12]
    driver = Driver()
    handle = driver.add([9], max_tokens=20, stop_ids=(*others, output[2]))
    driver.run()
    assert driver.tokens[handle] == output[: output.index(output[2]) + 1]


def test_min_tokens_holds_a_stop_back():
    output = expected_tokens([3, 3, 3], 20)
    driver = Driver()
    handle = driver.add([3, 3, 3], max_tokens=20, stop_ids=(output[0],), min_tokens=5)
    driver.run()
    assert len(driver.tokens[handle]) >= 5


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    driver = Driver(resolved(max_num_batched_tokens=8))
    handle = driver.add(list(range(30)), max_tokens=2)
    driver.run()
    assert driver.worker.batch_tokens[:4] == [8, 8, 8, 6]
    assert driver.tokens[handle] == expected_tokens(range(30), 2)


def test_three_requests_share_a_budget_of_ten():
    """Decodes and prefill chunks fill the same ten tokens: 3 + 5 + 2 of 12, then 1 + 1 + 8, then 1 + 1 + 2."""
    driver = Driver(resolved(max_num_batched_tokens=10))
    for length in (3, 5, 12):
        driver.add([length] * length, max_tokens=10)
    driver.run()
    assert [list(counts.values()) for counts in driver.worker.slot_tokens[:3]] == [[3, 5, 2], [1, 1, 8], [1, 1, 2]]


def test_a_second_request_with_the_same_prompt_recomputes_at_least_one_token():
    driver = Driver()
    first = driver.add([1] * 12, max_tokens=1)
    driver.run()
    second = driver.add([1] * 12, max_tokens=1)
    driver.run()
    assert driver.cached == {first: 0, second: 8}, "two of three full blocks: the last token must be computed"
    assert driver.tokens[first] == driver.tokens[second]
    assert (driver.stats.prefix_queries, driver.stats.prefix_hits) == (24, 8)


def test_two_requests_of_one_step_share_what_it_computes():
    driver = Driver()
    first, second = driver.add([1] * 9, max_tokens=3), driver.add([1] * 9, max_tokens=3)
    driver.run()
    assert driver.cached[second] == 8
    assert driver.tokens[first] == driver.tokens[second] == expected_tokens([1] * 9, 3)


@pytest.mark.parametrize("change", [{"cache_salt": "tenant"}, {"adapter": "french"}])
def test_another_salt_or_adapter_shares_nothing(change: dict[str, str]):
    driver = Driver()
    driver.add([1] * 12, max_tokens=1)
    driver.run()
    driver.core.load_adapter("french", "folder")
    other = driver.add([1] * 12, max_tokens=1, **change)
    driver.run()
    assert driver.cached[other] == 0


def test_generated_tokens_are_found_again():
    driver = Driver()
    prompt = [1, 2, 3]
    driver.add(prompt, max_tokens=14)
    driver.run()
    follow_up = driver.add([*prompt, *expected_tokens(prompt, 14)], max_tokens=1)
    driver.run()
    assert driver.cached[follow_up] == 16


def test_without_prefix_caching_nothing_is_found_or_named():
    driver = Driver(resolved(enable_prefix_caching=False))
    for _ in range(2):
        driver.add([1] * 12, max_tokens=6)
        driver.run()
    assert set(driver.cached.values()) == {0}
    assert not driver.core.scheduler.pool.block_of
    assert driver.stats.prefix_queries == 0


def test_preemption_recomputes_and_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture):
    driver = Driver(resolved(num_blocks=9, max_model_len=32, enable_prefix_caching=False))
    with caplog.at_level(logging.WARNING, "redline.core"):
        handles = [driver.add([i] * 7, max_tokens=20) for i in range(3)]
        driver.run()
    assert driver.stats.preemptions > 0
    for i, handle in enumerate(handles):
        assert driver.tokens[handle] == expected_tokens([i] * 7, 20)
    assert sum(one.preemptions for one in driver.finished.values()) == driver.stats.preemptions
    assert 1 <= len(caplog.records) <= driver.stats.preemptions
    assert "--kv-cache-memory-bytes" in caplog.text


def test_a_waiting_request_is_admitted_only_if_all_of_it_fits():
    driver = Driver(resolved(num_blocks=9, max_model_len=32, max_num_batched_tokens=4))
    driver.add([1] * 16, max_tokens=2)
    big = driver.add([2] * 20, max_tokens=2)
    driver.turn()
    assert driver.core.scheduler.slots.num_running == 1, "20 tokens need 5 blocks, 4 are free"
    driver.run()
    assert driver.tokens[big] == expected_tokens([2] * 20, 2)
    assert driver.stats.preemptions == 0


def test_a_prompt_that_cannot_be_served_is_refused_with_the_numbers():
    driver = Driver()
    handle, served = driver.add([1] * 64), driver.add([1] * 3, max_tokens=1)
    driver.run()
    assert driver.finished[handle].reason == FinishReason.ERROR
    assert "64" in driver.finished[handle].error
    assert driver.finished[served].reason == FinishReason.LENGTH


def test_max_model_len_ends_a_request():
    driver = Driver()
    handle = driver.add([1] * 60, max_tokens=50)
    driver.run()
    assert len(driver.tokens[handle]) == 4
    assert driver.finished[handle].reason == FinishReason.LENGTH


def test_an_unknown_utility_is_answered_with_an_error_and_the_cache_can_be_reset():
    driver = Driver()
    driver.add([1] * 12, max_tokens=1)
    driver.run()
    for call, (method, arguments) in enumerate([("nonsense", {}), ("reset_prefix_cache", {"x": 1})]):
        driver.core.receive(encode(Utility(0, call, method, arguments)))
    driver.core.receive(encode(Utility(0, 2, "reset_prefix_cache")))
    driver.run()
    answers = [message for message in driver.messages if isinstance(message, UtilityResult)]
    assert "nonsense" in answers[0].error
    assert "TypeError" in answers[1].error
    assert answers[2].result == 3
    again = driver.add([1] * 12, max_tokens=1)
    driver.run()
    assert driver.cached[again] == 0


def test_a_front_end_that_ended_leaves_nothing_and_the_one_that_follows_is_served():
    driver = Driver()
    send = driver.core._send
    driver.core._send = driver.core._publisher._send = lambda _front_end, data: send(0, data)  # the driver gets both
    first = 1 << 40  # where the front end that follows begins to number

    def add(front_end: int, sequence: int, tokens: int) -> int:
        handle = make_handle(front_end, sequence)
        driver.core.receive(encode(AddRequest(handle, column([sequence % 99] * 12), tokens, Sampling(), ())))
        return handle

    theirs, mine = add(0, 1, 40), add(1, 1, 40)
    driver.turn()
    driver.core.receive(encode(Utility(1, 7, "drop_front_end", {"front_end": 0, "first_sequence": first})))
    late = add(0, 2, 40)  # sent before the front end ended, received after
    after = add(0, first, 3)
    driver.run()
    assert driver.finished[theirs].reason == FinishReason.ABORT
    assert late not in driver.tokens
    assert late not in driver.finished
    assert (len(driver.tokens[mine]), len(driver.tokens[after])) == (40, 3)
    assert [one.result for one in driver.messages if isinstance(one, UtilityResult)] == [1]
    assert driver.core.scheduler.pool.usage == 0
    driver.core.scheduler.check()


def test_shutdown_drains_then_aborts_and_refuses_the_new():
    driver = Driver()
    short, long = driver.add([1], max_tokens=3), driver.add([2], max_tokens=60)
    driver.turn()
    driver.core.receive(encode(Shutdown(drain_s=10)))
    late = driver.add([3])
    assert not driver.core.finished
    for _ in range(80):
        if not driver.turn():
            driver.advance()
    assert driver.core.finished
    assert driver.finished[short].reason == FinishReason.LENGTH
    assert driver.finished[long].reason == FinishReason.ABORT
    assert driver.finished[late].reason == FinishReason.SHUT_DOWN
    assert "shutting down" in driver.finished[late].error
    assert driver.core.next_deadline(0.0) == 10


def test_a_failing_worker_is_not_swallowed():
    driver = Driver()
    driver.add([1], max_tokens=3)
    driver.turn()
    driver.worker.failure = RuntimeError("rank 0: out of memory")
    driver.advance()
    with pytest.raises(RuntimeError, match="rank 0"):
        driver.turn()


def test_stats_are_sent_also_while_a_long_prefill_yields_no_token():
    driver = Driver(resolved(max_num_batched_tokens=4, max_model_len=64))
    driver.add([1] * 40, max_tokens=1)
    driver.turn()
    driver.advance()
    driver.turn()
    told = [message.stats for message in driver.messages if isinstance(message, Outputs)]
    assert told
    assert told[-1] is not None
    assert told[-1].running == 1


def test_an_adapter_under_its_old_name_is_another():
    driver = Driver()
    driver.core.load_adapter("french", "one")
    first = driver.add([1] * 12, max_tokens=1, adapter="french")
    driver.run()
    again = driver.add([1] * 12, max_tokens=1, adapter="french")
    driver.run()
    assert driver.cached[first] == 0
    assert driver.cached[again] > 0
    driver.core._adapters.unload("french")
    driver.core.load_adapter("french", "two")
    other = driver.add([1] * 12, max_tokens=1, adapter="french")
    driver.run()
    assert driver.cached[other] == 0
    keys = [arguments["key"] for _, arguments in driver.worker.calls]
    assert keys == ["french#1", "french#1", "french#2"]


def test_an_adapter_that_is_not_served_ends_its_request_alone():
    driver = Driver()
    wrong = driver.add([1] * 12, max_tokens=1, adapter="dutch")
    right = driver.add([1] * 12, max_tokens=1)
    driver.run()
    assert "'dutch'" in driver.finished[wrong].error
    assert driver.finished[right].reason == FinishReason.LENGTH


def test_an_adapter_in_use_is_not_unloaded():
    driver = Driver()
    driver.core.load_adapter("french", "one")
    driver.add([1] * 12, max_tokens=5, adapter="french")
    driver.turn()
    with pytest.raises(RequestError, match=r"1 request\(s\) still use 'french'"):
        driver.core._adapters.unload("french")
    driver.run()
    driver.core._adapters.unload("french")
    assert driver.core._adapters.names() == {}
