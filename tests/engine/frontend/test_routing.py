"""The choice of a replica, and what it rests on."""

from collections import OrderedDict

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
