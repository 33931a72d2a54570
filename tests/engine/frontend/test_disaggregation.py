"""Prefill and decode replicas together: what is sent, what is lost on the way, and replicas that die, case by case."""

import re

import pytest

from engine.core.disaggregated_scheduler import MAX_LOCAL_BLOCKS
from engine.core.incoming_blocks import ARRIVAL_S
from engine.errors import EngineDeadError
from engine.messages import Abort
from tests.engine.fake_executor import expected_tokens
from tests.engine.frontend.disaggregated_fleet import DisaggregatedFleet

SIZE = 4  # tokens of a block
LONG = list(range(1, 38))  # 37 tokens: 9 full blocks, all of use
SHORT = LONG[: SIZE * MAX_LOCAL_BLOCKS]


def computed(fleet: DisaggregatedFleet, number: int) -> int:
    """The tokens that a replica has computed."""
    return sum(fleet.workers[number].batch_tokens)


async def test_a_long_prompt_is_computed_by_the_prefill_replica_and_continued_by_the_other():
    fleet = DisaggregatedFleet()
    stream = fleet.add(LONG, max_tokens=6)
    fleet.run()
    assert fleet.take(stream) == expected_tokens(LONG, 6)
    assert fleet.place(stream) == 1
    assert computed(fleet, 0) == len(LONG)
    assert computed(fleet, 1) == len(LONG) - 36 + 5, "the tail of the prompt, and the tokens but the last"
    core = fleet.router.total_stats.core
    assert (core.kv_transfers, core.kv_transfers_lost) == (1, 0)
    assert (core.kv_blocks_sent, core.kv_blocks_received, core.kv_blocks_rejected) == (9, 9, 0)
    assert core.prompt_tokens == len(LONG), "not counted twice"
    assert core.generation_tokens == 6, "the token of the prefill replica is dropped"
    assert stream.cached_tokens == [0]
    fleet.check_idle()


async def test_blocks_are_sent_while_later_ones_are_computed():
    fleet = DisaggregatedFleet()
    fleet.add(LONG)
    received = []
    while not fleet.cores[1].scheduler.requests:
        assert fleet.turn()
        received.append((len(fleet.workers[0].steps), fleet.cores[1].scheduler.incoming.counters.blocks))
    counts = [blocks for _, blocks in received]
    assert {0, 4, 8, 9} <= set(counts), "the budget of a step is 16 tokens"


async def test_a_short_prompt_stays_where_it_is_decoded():
    fleet = DisaggregatedFleet()
    stream = fleet.add(SHORT)
    fleet.run()
    assert fleet.take(stream) == expected_tokens(SHORT, 4)
    assert computed(fleet, 0) == 0
    assert fleet.router.total_stats.core.kv_transfers == 0


async def test_what_the_decode_replica_has_cached_is_not_sent_again():
    fleet = DisaggregatedFleet()
    first = fleet.add(LONG, max_tokens=8)
    fleet.run()
    again = fleet.add(LONG[:25] + [9] * 30)
    fleet.run()
    assert fleet.take(again) == expected_tokens(LONG[:25] + [9] * 30, 4)
    assert fleet.take(first) == expected_tokens(LONG, 8)
    assert fleet.router.total_stats.core.kv_blocks_sent == 9 + (54 // SIZE - 6)
    assert again.cached_tokens == [24]
    same = fleet.add(LONG[:25] + [9] * 30)
    fleet.run()
    assert fleet.take(same) == expected_tokens(LONG[:25] + [9] * 30, 4)
    assert fleet.router.total_stats.core.kv_transfers == 2, "all of it was cached"
    fleet.check_idle()


async def test_the_outputs_of_a_prompt_wait_for_one_transfer():
    fleet = DisaggregatedFleet()
    stream = fleet.add(LONG, n=3)
    fleet.run()
    assert sorted(fleet.take(stream)) == sorted(3 * expected_tokens(LONG, 4))
    core = fleet.router.total_stats.core
    assert (core.kv_transfers, core.kv_blocks_sent) == (1, 9)
    fleet.check_idle()


async def test_prompt_logprobs_are_computed_where_the_request_is():
    fleet = DisaggregatedFleet()
    stream = fleet.add(LONG, prompt_logprobs=1)
    fleet.run()
    assert fleet.take(stream) == expected_tokens(LONG, 4)
    assert computed(fleet, 0) == 0


async def test_prompts_wait_in_order_until_there_is_room_for_their_blocks():
    fleet = DisaggregatedFleet(transfer_blocks=10)
    prompts = [[start, *LONG[1:]] for start in range(5)]
    streams = [fleet.add(prompt) for prompt in prompts]
    fleet.turn()
    assert len(fleet.cores[0].scheduler.requests) <= 1
    fleet.run()
    assert [fleet.take(stream) for stream in streams] == [expected_tokens(prompt, 4) for prompt in prompts]
    assert fleet.router.total_stats.core.kv_transfers == 5
    fleet.check_idle()


async def test_a_prompt_too_long_for_the_room_is_computed_by_the_decode_replica():
    fleet = DisaggregatedFleet(transfer_blocks=8)
    stream = fleet.add(LONG)
    fleet.run()
    assert fleet.take(stream) == expected_tokens(LONG, 4)
    assert computed(fleet, 0) == 0


@pytest.mark.parametrize("lost", ["all", "damaged", "one"])
async def test_what_is_lost_is_computed_again(lost: str, caplog: pytest.LogCaptureFixture):
    shipments = iter(range(100))
    fleet = DisaggregatedFleet(
        delay=lambda: None if lost == "all" or (lost == "one" and next(shipments) == 1) else 0,
        damage=lambda: lost == "damaged",
    )
    stream = fleet.add(LONG)
    fleet.run()
    assert fleet.take(stream) == expected_tokens(LONG, 4)
    core = fleet.router.total_stats.core
    assert (core.kv_transfers, core.kv_transfers_lost) == (1, 1)
    assert core.kv_blocks_rejected == (4 if lost == "damaged" else 0)
    waited = fleet.clock.now() > ARRIVAL_S + 3
    causes = re.findall(r"(\d+) KV blocks of a prompt are computed here: (.*)", caplog.text)
    missing, cause = {
        "all": ("9", "none has arrived for 5 s"),
        "damaged": ("9", "blocks that arrived can't be used"),
        "one": ("4", "none has arrived for 5 s"),
    }[lost]
    assert causes == [(missing, cause)]
    assert waited == (lost != "damaged"), "a damaged block is known at once, a lost one once it is late"
    fleet.check_idle()


async def test_blocks_that_come_late_are_waited_for():
    fleet = DisaggregatedFleet(delay=lambda: 7)
    stream = fleet.add(LONG)
    fleet.run()
    assert fleet.take(stream) == expected_tokens(LONG, 4)
    assert fleet.router.total_stats.core.kv_transfers_lost == 0


@pytest.mark.parametrize("disk_blocks", [0, 100])
async def test_what_a_replica_keeps_outside_of_its_kv_cache_is_not_sent_again(disk_blocks: int):
    """The KV cache of each replica holds two prompts, host memory three or all."""
    host_blocks = 100 if not disk_blocks else 30
    fleet = DisaggregatedFleet(num_blocks=25, host_blocks=host_blocks, disk_blocks=disk_blocks)
    prompts = [[start, *LONG] for start in range(6)]
    for sent in (len(prompts) * 9, len(prompts) * 9):
        for prompt in prompts:
            stream = fleet.add(prompt)
            fleet.run()
            assert fleet.take(stream) == expected_tokens(prompt, 4)
            for files in fleet.files:
                files.pump(100)
        assert fleet.router.total_stats.core.kv_blocks_sent == sent, "not a second time"
    assert fleet.router.total_stats.core.kv_transfers_lost == 0
    spill = fleet.cores[1].scheduler.stats(0.0).spill
    assert spill is not None
    assert spill.host_hits + spill.disk_hits >= 6 * 9 - 24
    assert (spill.disk_hits > 0) == (disk_blocks > 0)
    fleet.check_idle()


async def test_a_file_that_is_broken_is_computed_where_the_blocks_that_follow_arrive():
    fleet = DisaggregatedFleet(num_blocks=25, host_blocks=30, disk_blocks=100)
    for start in range(6):
        fleet.add([start, *LONG])
        fleet.run()
        fleet.files[1].pump(100)
    fleet.files[1].fails = lambda: True
    longer = [0, *LONG, *range(20, 45)]
    stream = fleet.add(longer, max_tokens=1)
    fleet.run()
    assert fleet.take(stream) == expected_tokens(longer, 1)
    assert fleet.router.total_stats.core.kv_blocks_sent == 6 * 9 + 6, "those that follow the first nine"
    spill = fleet.cores[1].scheduler.stats(0.0).spill
    assert spill is not None
    assert spill.disk_faults > 0
    fleet.files[1].fails = lambda: False
    fleet.run()
    fleet.check_idle()


async def test_the_death_of_a_prefill_replica_costs_no_request():
    fleet = DisaggregatedFleet(prefill=2, transfer_blocks=64)
    streams = [fleet.add([start, *LONG]) for start in range(4)]
    for _ in range(3):
        fleet.turn()
    busy = [number for number in (0, 1) if fleet.cores[number].scheduler.requests]
    assert busy == [0, 1], "both compute prompts"
    fleet.kill(0)
    fleet.run()
    assert [fleet.take(one) for one in streams] == [expected_tokens([start, *LONG], 4) for start in range(4)]
    assert fleet.router.total_stats.core.kv_transfers_lost >= 1
    fleet.kill(1)
    last = fleet.add([8, *LONG])
    fleet.run()
    assert fleet.take(last) == expected_tokens([8, *LONG], 4), "the decode replica computes it"
    fleet.restart(0)
    before = fleet.router.total_stats.core.kv_blocks_sent
    again = fleet.add([9, *LONG])
    fleet.run()
    assert fleet.take(again) == expected_tokens([9, *LONG], 4)
    assert fleet.router.total_stats.core.kv_blocks_sent == before + 9
    fleet.check_idle()


async def test_a_replica_that_can_not_be_reached_computes_its_prompts_at_once(caplog: pytest.LogCaptureFixture):
    """And the prefill replica serves the others."""
    cut = True
    fleet = DisaggregatedFleet(
        decode=2, fault=lambda _, decode: "the network is cut" if cut and decode == 1 else "", transfer_blocks=64
    )
    prompts = [[start, *LONG] for start in range(4)]
    streams = [fleet.add(prompt) for prompt in prompts]
    assert sorted(map(fleet.place, streams)) == [1, 1, 2, 2]
    fleet.run()
    assert [fleet.take(one) for one in streams] == [expected_tokens(prompt, 4) for prompt in prompts]
    core = fleet.router.total_stats.core
    assert (core.kv_transfers, core.kv_transfers_lost) == (4, 2)
    assert caplog.text.count("9 KV blocks of a prompt are computed here: the network is cut") == 2
    assert fleet.clock.now() < 15, "nothing waited for blocks that can't come"
    cut = False
    again = [fleet.add([start, *LONG]) for start in range(4, 6)]
    fleet.run()
    assert [fleet.take(one) for one in again] == [expected_tokens([start, *LONG], 4) for start in range(4, 6)]
    assert fleet.router.total_stats.core.kv_transfers_lost == 2
    fleet.check_idle()


async def test_another_prefill_replica_computes_what_one_can_not_send():
    fleet = DisaggregatedFleet(prefill=3, fault=lambda prefill, _: "cut" if prefill < 2 else "", transfer_blocks=64)
    prompts = [[start, *LONG] for start in range(4)]
    streams = [fleet.add(prompt) for prompt in prompts]
    fleet.run()
    assert [fleet.take(one) for one in streams] == [expected_tokens(prompt, 4) for prompt in prompts]
    core = fleet.router.total_stats.core
    assert (core.kv_transfers, core.kv_transfers_lost) == (4, 0)
    assert [computed(fleet, number) for number in range(3)] == [0, 0, sum(map(len, prompts))]
    fleet.check_idle()


async def test_prompts_that_a_draining_prefill_replica_has_no_time_for_are_computed_elsewhere():
    fleet = DisaggregatedFleet(prefill=2, transfer_blocks=64)
    streams = [fleet.add([start, *LONG]) for start in range(4)]
    for _ in range(3):
        fleet.turn()
    assert all(fleet.cores[number].scheduler.requests for number in (0, 1)), "both compute prompts"
    drained: set[int] = set()
    fleet.router.on_drained = lambda replica, _drain: drained.add(replica)
    fleet.router.drain(0, 1)
    assert not drained
    fleet.router.end_drain(0, "its time is up")
    assert drained == {0}
    fleet.run()
    assert [fleet.take(one) for one in streams] == [expected_tokens([start, *LONG], 4) for start in range(4)]
    assert fleet.router.total_stats.core.kv_transfers_lost >= 1
    assert fleet.router.total_stats.events("drain_timeout") == 0
    fleet.check_idle()


async def test_what_a_dead_decode_replica_has_not_begun_is_retried_elsewhere():
    fleet = DisaggregatedFleet(decode=2, delay=lambda: 3)
    begun, waiting = fleet.add(LONG, max_tokens=20), fleet.add([5, *LONG], max_tokens=20)
    while not fleet.take(begun):
        assert fleet.turn()
    dead, other = fleet.place(begun), fleet.place(waiting)
    assert {dead, other} == {1, 2}
    late = [fleet.add([start, *LONG]) for start in range(6, 10)]
    there = [stream for stream in late if fleet.place(stream) == dead]
    assert there
    fleet.kill(dead)
    fleet.run()
    with pytest.raises(EngineDeadError, match="it was killed"):
        fleet.take(begun)
    assert fleet.take(waiting) == expected_tokens([5, *LONG], 20)
    assert [fleet.take(one) for one in late] == [expected_tokens([start, *LONG], 4) for start in range(6, 10)]
    fleet.check_idle()


async def test_prefill_replicas_serve_while_no_decode_replica_lives():
    fleet = DisaggregatedFleet()
    waiting = fleet.add(LONG)
    fleet.turn()
    fleet.kill(1)
    later = fleet.add([7, *LONG])
    fleet.run()
    assert fleet.take(waiting) == expected_tokens(LONG, 4)
    assert fleet.take(later) == expected_tokens([7, *LONG], 4)
    assert fleet.router.total_stats.core.generation_tokens == 8
    fleet.restart(1)
    back = fleet.add([8, *LONG])
    fleet.run()
    assert (fleet.place(back), fleet.take(back)) == (1, expected_tokens([8, *LONG], 4))
    fleet.kill(0)
    fleet.kill(1)
    assert "no replica is left" in (fleet.router.dead or "")
    with pytest.raises(EngineDeadError):
        fleet.add(LONG)


async def test_an_abort_ends_the_prefill_too():
    fleet = DisaggregatedFleet()
    streams = [fleet.add([start, *LONG]) for start in range(3)]
    fleet.turn()
    assert fleet.cores[0].scheduler.requests or fleet.cores[0].has_work
    for stream in streams:
        stream.close()
    fleet.run()
    assert fleet.router.total_stats.core.generation_tokens == 0
    fleet.check_idle()


async def test_a_request_that_waits_for_blocks_can_be_aborted():
    fleet = DisaggregatedFleet(delay=lambda: None)
    stream = fleet.add(LONG)
    fleet.turn()
    assert fleet.cores[1].has_work, "it waits"
    handle = next(iter(stream.live))
    assert handle in fleet.cores[1]._parked
    fleet.router.trackers[1].client._transport.send(Abort((handle,)))
    fleet.run()
    assert not fleet.cores[1].has_work
