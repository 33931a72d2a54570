"""The choice of a replica, and what it rests on."""

from collections import OrderedDict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.columns import column
from engine.core.request import Request
from engine.frontend.routing import (
    INITIAL_OUTPUT_TOKENS,
    PREFIX_WEIGHT,
    Candidate,
    OutputLengthEstimate,
    PrefixIndex,
    least_cost,
    make_routing_policy,
    prompt_block_hashes,
)
from engine.frontend.streams import RequestOptions
from engine.messages import AddRequest, Sampling
from tests.engine.core.spill_driver import SpillDriver
from tests.engine.core_driver import resolved
from tests.engine.frontend.fleet import Fleet

SIZE = 4
tokens = st.integers(0, 5000)
candidates = st.lists(st.builds(Candidate, st.integers(0, 5000).map(float), tokens, tokens.map(float)), min_size=1)


@given(candidates)
def test_a_prefix_is_honoured_up_to_twice_its_tokens_of_waiting(found: list[Candidate]):
    chosen = found[least_cost(found)]
    for other in found:
        assert chosen.load - other.load <= PREFIX_WEIGHT * (chosen.cached - other.cached)
        if chosen.load - other.load == PREFIX_WEIGHT * (chosen.cached - other.cached):
            assert chosen.assigned <= other.assigned


@given(st.integers(1, 12), st.integers(1, 200))
def test_equal_replicas_take_turns(replicas: int, requests: int):
    given_to = [0.0] * replicas
    for _ in range(requests):
        given_to[least_cost([Candidate(0.0, 0, given) for given in given_to])] += 10.0
    assert max(given_to) - min(given_to) <= 10.0


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_random_is_seeded_and_leaves_nobody_out(replicas: int, seed: int):
    found = [Candidate(0.0, 0, 0.0)] * replicas
    first, second = (make_routing_policy("random", seed).choose for _ in range(2))
    chosen = [first(found) for _ in range(60 * replicas)]
    assert chosen == [second(found) for _ in chosen]
    assert set(chosen) == set(range(replicas))


def test_only_prefix_routing_names_blocks():
    assert [make_routing_policy(name, 0).by_prefix for name in ("prefix", "least-loaded", "random")] == [
        True,
        False,
        False,
    ]


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=30)


@given(st.lists(prompts, max_size=30), st.integers(1, 12))
def test_what_is_held_is_what_was_given_last_heads_before_tails(given_prompts: list[list[int]], capacity: int):
    held, model = PrefixIndex(capacity), OrderedDict[bytes, None]()
    for prompt in given_prompts:
        names = prompt_block_hashes(prompt, RequestOptions(), SIZE)
        leading = held.count_leading(names)
        assert leading <= len(names)
        assert all(name in model for name in names[:leading])
        held.record(names)
        for name in reversed(names):
            model[name] = None
        assert len(held) <= capacity
        assert held.count_leading(names) == min(capacity, len(names)), "all of it, or its head"


@given(prompts, st.text(max_size=3), st.sampled_from(["", "french"]))
def test_blocks_are_named_apart_where_the_core_does(prompt: list[int], salt: str, adapter: str):
    names = prompt_block_hashes(prompt, RequestOptions(cache_salt=salt, adapter=adapter), SIZE)
    assert len(names) == len(prompt) // SIZE
    request = Request(AddRequest(1, column(prompt), 1, Sampling(), cache_salt=salt, adapter=adapter), 99, 0.0)
    request.hash_prompt(SIZE)
    assert names == request.block_hashes
    if names:
        assert names[0] != prompt_block_hashes(prompt, RequestOptions(cache_salt=salt + "x", adapter=adapter), SIZE)[0]


@pytest.mark.parametrize(("limit", "expected"), [(None, INITIAL_OUTPUT_TOKENS), (5, 5), (1000, INITIAL_OUTPUT_TOKENS)])
def test_outputs_are_expected_to_be_as_long_as_they_were_and_may_be(limit: int | None, expected: float):
    lengths = OutputLengthEstimate()
    assert lengths.expected(limit) == expected
    for _ in range(1000):
        lengths.observe(20)
    assert 19.9 < lengths.expected(None) < 20.1
    assert lengths.expected(3) == 3


TURN = 3 * SIZE  # tokens that a conversation grows by
POOL, TALKS, TURNS = 24, 8, 80


def conversations(seed: int) -> list[list[int]]:
    """The prompts of conversations that go on in turns; at their end they need several times the pool."""
    luck = Random(seed)
    talks = [[number] for number in range(TALKS)]
    prompts = []
    for _ in range(TURNS):
        talk = luck.choice(talks)
        if len(talk) > 16 * SIZE:  # it begins anew
            del talk[1:]
        talk += [luck.randrange(50) for _ in range(TURN)]
        prompts.append(list(talk))
    return prompts


def found_and_expected(seed: int, known: tuple[int, int], host: int, disk: int) -> tuple[int, int, int]:
    """Blocks that a core with tiers finds of all prompts, those that an index of `known` sizes expects, and how many
    blocks it is wrong by."""
    config = resolved(num_blocks=POOL + 1, host_blocks=host, max_num_seqs=1, max_model_len=128)
    driver = SpillDriver(config, lambda *_: 0.01)
    if disk:
        driver.use_disk(disk)
    index, found, expected, wrong = PrefixIndex(POOL, known), 0, 0, 0
    for prompt in conversations(seed):
        hashes = prompt_block_hashes(prompt, RequestOptions(), SIZE)
        guess = min(index.count_leading(hashes), (len(prompt) - 1) // SIZE)
        index.record(hashes)
        handle = driver.add(prompt, 1)
        driver.run()
        driver.settle()
        cached = driver.cached[handle] // SIZE
        found, expected, wrong = found + cached, expected + guess, wrong + abs(cached - guess)
    return found, expected, wrong


@pytest.mark.parametrize(("host", "disk"), [(20, 0), (60, 0), (200, 0), (40, 60), (40, 200)])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_expected_of_all_tiers_is_what_the_core_finds(seed: int, host: int, disk: int):
    found, expected, wrong = found_and_expected(seed, (host, disk), host, disk)
    assert wrong <= 0.05 * found, f"{found} blocks were found, {expected} expected"
    found, expected, _ = found_and_expected(seed, (0, 0), host, disk)
    assert expected < 0.8 * found, "without the tiers many are not expected"


def test_tiers_hold_no_more_than_they_have_room_for():
    index = PrefixIndex(2, (3, 4))
    for number in range(20):
        index.record([bytes([number])])
    kept = [number for number in range(20) if bytes([number]) in index]
    assert kept == [14, 15, 16, 17, 18, 19], "two in the KV cache, three in host memory, and one more in files"
    index.record([bytes([14])])  # it is read from its file into host memory
    assert [number for number in range(20) if bytes([number]) in index] == [14, 16, 17, 18, 19]
    index.clear()
    assert not [number for number in range(20) if bytes([number]) in index]


async def hits(tiers: int) -> tuple[float, int]:
    """The share of prompt tokens that two replicas with host blocks find, and how often a conversation moves, with a
    router that knows of `tiers` blocks."""
    fleet = Fleet(2, num_blocks=POOL + 1, host_blocks=200, max_model_len=128, spilled_blocks=(tiers, 0))
    moves, places = 0, dict[int, int]()
    for prompt in conversations(1):
        stream = fleet.add(prompt, max_tokens=1)
        place = fleet.place(stream)
        moves += places.setdefault(prompt[0], place) != place
        places[prompt[0]] = place
        fleet.run()
        fleet.take(stream)
    core = fleet.router.total_stats.core
    return core.prefix_hits / core.prefix_queries, moves


async def test_conversations_stay_where_their_evicted_blocks_are():
    knowing, moves = await hits(200)
    guessing, more_moves = await hits(0)
    assert moves < more_moves / 2
    assert knowing > guessing + 0.1
