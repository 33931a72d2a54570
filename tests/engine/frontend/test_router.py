"""A router over real cores: who gets a request, what becomes of it when a replica dies, and what all of them sum to."""

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.config import ROUTINGS
from engine.errors import EngineDeadError, RequestError
from engine.frontend.front_end_stats import Board
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import RequestStream
from engine.grammar import Grammar
from engine.messages import Dead, Hung
from tests.engine.fake_executor import expected_tokens
from tests.engine.frontend.fleet import Fleet
from tests.engine.frontend.test_core_client import Listener

LONG = [7] * 40  # ten blocks


async def call(fleet: Fleet, method: str, **arguments: Any) -> Any:
    """A utility's answer, while the cores step."""
    asked = asyncio.ensure_future(fleet.router.call_utility(method, **arguments))
    while not asked.done():
        await asyncio.sleep(0)
        fleet.turn()
    return await asked


def health(fleet: Fleet) -> list[dict[str, Any]]:
    return [replica.health() for replica in fleet.router.cores]


async def test_a_prefix_goes_where_it_is_held_and_another_one_where_less_is_to_do():
    fleet = Fleet(3)
    places = {}
    for group in range(3):
        stream = fleet.add([group] * 40)
        places[group] = fleet.place(stream)
        fleet.run()
    assert set(places.values()) == {0, 1, 2}
    for group in (2, 0, 1, 1, 0):
        stream = fleet.add([group] * 40 + [9, 9])
        assert fleet.place(stream) == places[group]
        fleet.run()
        assert stream.cached_tokens == [40]


async def test_a_busy_replica_loses_its_prefix_to_an_idle_one_that_then_holds_it_too():
    fleet = Fleet(2)
    stream = fleet.add(LONG, max_tokens=20)
    first = fleet.place(stream)
    while not fleet.take(stream):
        fleet.turn()
    places = [fleet.place(fleet.add([*LONG, 1, 2], max_tokens=20)) for _ in range(12)]
    turned = places.index(1 - first)
    assert turned == 3, "forty tokens saved are worth eighty to wait for: twenty, and three times twenty-two"
    assert set(places[turned + 1 :]) == {0, 1}
    assert abs(places.count(0) - places.count(1)) <= turned
    fleet.run()
    assert all(core.scheduler.stats(0.0).prefix_hits for core in fleet.cores)


async def test_a_prefix_is_worth_nothing_to_a_request_that_computes_all_of_its_prompt():
    fleet = Fleet(2)
    first = fleet.place(fleet.add(LONG))
    fleet.run()
    params = SamplingParams(max_tokens=4, temperature=0, n=3, prompt_logprobs=0)
    before = [tracker.assigned_tokens for tracker in fleet.router.trackers]
    stream = fleet.router.add_request([LONG], params)
    other = fleet.place(stream)
    assert other != first, "the other one was given less"
    assert fleet.router.trackers[other].assigned_tokens - before[other] >= 3 * len(LONG), (
        "each output computes the prompt"
    )
    stream.close()
    fleet.run()


async def test_another_salt_or_adapter_finds_no_prefix():
    fleet = Fleet(2)
    await call(fleet, "load_adapter", name="french", path="folder")
    first = fleet.place(fleet.add(LONG))
    fleet.run()
    for more in ({"cache_salt": "a"}, {"adapter": "french"}):
        stream = fleet.add(LONG, **more)
        assert fleet.place(stream) != first, "nobody holds it, and the other one was given less"
        fleet.run()
        assert stream.cached_tokens == [0]
        for _ in range(2):  # evens out what they were given
            fleet.add([3] * 20, max_tokens=1)
            fleet.run()
        first = min(fleet.router.trackers, key=lambda one: -one.assigned_tokens).client.replica


@pytest.mark.parametrize("routing", ROUTINGS)
async def test_seeds_are_those_of_the_order_of_requests_wherever_they_go(routing: str):
    def seeds(fleet: Fleet) -> list[int]:
        for number in range(8):
            fleet.router.add_request([[number]], SamplingParams(max_tokens=2, temperature=1))
        sent = sorted((one.handle, one.sampling.seed) for some in fleet.added for one in some)
        return [seed for _, seed in sent]

    drawn = seeds(Fleet(3, routing, seed=5))
    assert drawn == seeds(Fleet(1))
    assert len(set(drawn)) == 8


async def test_least_loaded_looks_at_what_is_left_not_at_the_number_of_requests():
    fleet = Fleet(2, "least-loaded", max_model_len=256, num_blocks=129)
    long = fleet.place(fleet.add([1] * 200, max_tokens=8))
    places = [fleet.place(fleet.add([number], max_tokens=8)) for number in range(10)]
    assert places == [1 - long] * 10
    fleet.run()
    assert [tracker.tokens_left() for tracker in fleet.router.trackers] == [0.0, 0.0]


async def test_a_computed_prompt_no_longer_counts():
    fleet = Fleet(1)
    stream = fleet.add(LONG, max_tokens=20)
    [replica] = fleet.router.trackers
    assert replica.tokens_left() == 60
    while not fleet.take(stream):
        fleet.turn()
    assert replica.tokens_left() == 20
    stream.close()
    assert replica.tokens_left() == 0


async def test_front_ends_see_what_others_gave():
    boards = [Board(2) for _ in range(2)]
    fleet = Fleet(2, "least-loaded", boards=boards)
    boards[0].stats[1].load = 50.0  # of another front end
    assert [fleet.place(fleet.add([number] * 4, max_tokens=4)) for number in range(4)] == [1] * 4


async def test_what_has_not_begun_moves_and_what_has_fails_with_the_cause():
    fleet = Fleet(2, "least-loaded")
    begun, other = fleet.add([1], max_tokens=9), fleet.add([2], max_tokens=9)
    assert [fleet.place(one) for one in (begun, other)] == [0, 1]
    while not (fleet.take(begun) and fleet.take(other)):
        fleet.turn()
    fresh = [fleet.add([3, number], max_tokens=3) for number in range(4)]
    assert {fleet.place(one) for one in fresh} == {0, 1}
    fleet.kill(0)
    assert [fleet.place(one) for one in fresh] == [1] * 4
    with pytest.raises(EngineDeadError, match="replica 0: it was killed"):
        assert not begun.is_open
    fleet.run()
    assert fleet.take(other) == expected_tokens([2], 9)
    for number, stream in enumerate(fresh):
        assert fleet.take(stream) == expected_tokens([3, number], 3)
        assert not stream.is_open
    assert fleet.router.total_stats.live == 0
    assert fleet.router.total_stats.finished == {"length": 5, "error": 1}


async def test_a_request_moves_once_lest_it_kills_them_all():
    fleet = Fleet(3)
    poison = fleet.add([1] * 60)
    fleet.kill(fleet.place(poison))
    fleet.kill(fleet.place(poison))
    with pytest.raises(EngineDeadError, match="it was killed"):
        assert not poison.is_open
    assert len(fleet.living) == 1
    fleet.run()
    assert fleet.take(fleet.add([1])) == []


async def test_the_last_one_that_dies_ends_all():
    fleet = Fleet(2)
    causes: list[str] = []
    fleet.router.listener = Listener(causes=causes)
    stream = fleet.add([1])
    fleet.say(0, Dead("out of luck"))
    assert (causes, fleet.place(stream)) == ([], 1)
    fleet.kill(0)
    fleet.kill(1)
    fleet.kill(1)
    assert causes == ["no replica is left; replica 1: it was killed"]
    for waiting in (lambda: stream.is_open, lambda: fleet.add([1])):
        with pytest.raises(EngineDeadError, match="replica 1: it was killed"):
            waiting()
    with pytest.raises(EngineDeadError):
        await fleet.router.call_utility("adapters")


async def test_the_end_of_all_moves_nothing():
    fleet = Fleet(2)
    streams = [fleet.add([number]) for number in range(4)]
    fleet.router.close()
    for stream in streams:
        with pytest.raises(EngineDeadError, match=r"^the server was stopped before"):
            assert not stream.is_open
    assert [len(some) for some in fleet.added] == [2, 2]


async def test_whoever_hangs_gets_nothing_while_another_steps():
    fleet = Fleet(2)
    fleet.say(0, Hung("rank 0 hangs"))
    assert {fleet.place(fleet.add([number])) for number in range(6)} == {1}
    assert fleet.router.hung == ""
    assert [one["status"] for one in health(fleet)] == ["hung", "ok"]
    fleet.say(1, Hung("rank 0 hangs too"))
    assert fleet.router.hung == "rank 0 hangs"
    assert {fleet.place(fleet.add([number])) for number in range(12)} == {0, 1}
    fleet.say(0, Hung())
    fleet.kill(1)
    assert fleet.router.hung == ""
    assert [one["status"] for one in health(fleet)] == ["ok", "dead"]


@pytest.mark.parametrize("prompt", [[], [1] * 64, [-1], [2**40]])
async def test_what_cannot_be_served_is_refused_before_anybody_sees_it(prompt: list[int]):
    fleet = Fleet(2)
    with pytest.raises(RequestError):
        fleet.add(prompt)
    assert fleet.added == [[], []]


async def test_figures_are_sums_and_those_of_the_dead_stay():
    fleet = Fleet(2)
    streams = [fleet.add([number] * 8, max_tokens=4) for number in range(4)]
    fleet.run()
    assert all(not stream.is_open for stream in streams)
    stats = fleet.router.total_stats
    assert (stats.core.generation_tokens, stats.core.prompt_tokens) == (16, 32)
    assert (stats.finished, sum(stats.ttft.counts)) == ({"length": 4}, 4)
    assert stats.step_tokens.total == 48
    fleet.add([9] * 8, max_tokens=30), fleet.add([8] * 8, max_tokens=30)
    for _ in range(4):
        fleet.turn()
    running = fleet.router.total_stats.core
    assert (running.running, len(fleet.living)) == (2, 2)
    assert 0 < running.kv_cache_usage < 1
    fleet.kill(0)
    left = fleet.router.total_stats.core
    assert (left.running, left.generation_tokens) == (1, running.generation_tokens)
    assert [one["running"] for one in health(fleet)] == [0, 1]


async def test_a_utility_is_done_by_all_or_by_none():
    fleet = Fleet(2)
    fleet.add(LONG), fleet.add([1] * 40)
    fleet.run()
    assert await call(fleet, "reset_prefix_cache") == 20
    assert [fleet.place(fleet.add([number])) for number in range(2)] == [0, 1]
    fleet.run()
    await call(fleet, "load_adapter", name="french", path="one")
    assert await call(fleet, "adapters") == {"french": "one"}
    fleet.cores[1].load_adapter("dutch", "elsewhere")
    with pytest.raises(RequestError.__base__, match="'dutch' is served already"):
        await call(fleet, "load_adapter", name="dutch", path="here")
    assert await call(fleet, "adapters") == {"french": "one"}, "what one alone has is not served"
    assert ("unload_adapter", {"key": "dutch#2"}) in fleet.workers[0].calls
    busy = fleet.add([1], max_tokens=50, adapter="french")
    fleet.turn()
    with pytest.raises(RequestError.__base__, match=r"request\(s\) still use 'french'"):
        await call(fleet, "unload_adapter", name="french")
    assert busy.is_open
    assert await call(fleet, "adapters") == {"french": "one"}
    busy.close()
    fleet.run()
    fleet.kill(0)
    await call(fleet, "unload_adapter", name="french")
    assert await call(fleet, "adapters") == {"dutch": "elsewhere"}


async def test_a_grammar_is_compiled_by_all_replicas_and_counted_once():
    fleet = Fleet(2)

    async def check(pattern: str) -> str:
        asked = asyncio.ensure_future(fleet.router.check_grammar(Grammar("regex", pattern)))
        while not asked.done():
            await asyncio.sleep(0.001)
            fleet.turn()
        return await asked

    assert [await check("0+"), await check("0+")] == ["", ""]
    assert "unclosed group" in await check("a(")
    fleet.router.cores[0].hung = "a step takes long"
    assert await check("1+") == ""
    stats = fleet.router.total_stats
    assert (stats.grammars("requests"), stats.grammars("hits")) == (4, 1)
    assert sum(stats.grammar_compilations.counts) == 2 + 2 + 1
    assert stats.grammar_compilations.total > 0


async def test_a_replica_that_dies_meanwhile_fails_no_utility():
    fleet = Fleet(2)
    asked = asyncio.ensure_future(fleet.router.call_utility("reset_prefix_cache"))
    await asyncio.sleep(0)
    fleet.kill(0)
    while not asked.done():
        fleet.turn()
        await asyncio.sleep(0)
    assert await asked == 0


groups = st.integers(0, 3).map(lambda group: [group] * 16)
requests = st.tuples(st.just("add"), groups, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 12))
events = st.one_of(
    requests,
    requests,
    st.tuples(st.just("turn"), st.integers(1, 8)),
    st.tuples(st.just("close"), st.integers(0, 20)),
    st.tuples(st.just("hang"), st.integers(0, 3), st.sampled_from(["", "it hangs"])),
    st.tuples(st.just("kill"), st.integers(0, 3)),
)


@settings(deadline=None)
@given(st.integers(2, 4), st.sampled_from(ROUTINGS), st.lists(events, min_size=8, max_size=40))
def test_whatever_happens_requests_get_their_own_tokens_or_the_cause(
    count: int, routing: str, happened: list[tuple[Any, ...]]
):
    asyncio.run(happen(count, routing, happened))


async def happen(count: int, routing: str, happened: list[tuple[Any, ...]]) -> None:
    """No message reaches a dead replica: the fleet asserts it."""
    fleet = Fleet(count, routing)
    asked: list[Asked] = []
    for one in happened:
        let(fleet, asked, one)
    fleet.run()
    for one in asked:
        judge(fleet, one)
    assert fleet.router.total_stats.live == 0
    assert [tracker.tokens_left() for tracker in fleet.router.trackers] == [0.0] * count
    for number in fleet.living:
        fleet.cores[number].scheduler.check()


@dataclass
class Asked:
    stream: RequestStream
    whole: list[int]  # what it must get
    closed: bool = False


def let(fleet: Fleet, asked: list[Asked], happened: tuple[Any, ...]) -> None:
    what, *more = happened
    if what == "add":
        prompt, length = more[0] + more[1], more[2]
        asked.append(Asked(fleet.add(prompt, length), expected_tokens(prompt, length)))
        place = fleet.router.cores[fleet.place(asked[-1].stream)]
        assert place.dead is None
        assert not place.hung or all(one.hung for one in fleet.router.cores if one.dead is None)
    elif what == "turn":
        for _ in range(more[0]):
            fleet.turn()
    elif what == "close" and asked:
        one = asked[more[0] % len(asked)]
        one.closed = True
        one.stream.close()
    elif what == "hang" and more[0] in fleet.living:
        fleet.say(more[0], Hung(more[1]))
    elif what == "kill" and more[0] in fleet.living and len(fleet.living) > 1:
        fleet.kill(more[0])


def judge(fleet: Fleet, asked: Asked) -> None:
    stream = asked.stream
    try:
        read = fleet.take(stream)
    except EngineDeadError:
        read = fleet.read[id(stream)]
        assert fleet.place(stream) not in fleet.living
        assert read or stream.moved, "nothing had come of it: it should have moved"
        event("a request failed")
    else:
        assert not stream.is_open
        assert asked.closed or read == asked.whole
        if stream.moved:
            event("a request moved")
    assert read == asked.whole[: len(read)]
