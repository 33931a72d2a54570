"""Tokens of simulated hardware: at random by seed and position, or those of the prompt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.columns import column
from engine.hardware.tokens import EchoTokens, RandomTokens, TokenSource, make_tokens
from engine.messages import Sampling, SlotAssignment

VOCABULARY = 1000


def assign(source: TokenSource, slot: int, prompt: list[int], sampling: Sampling, more: tuple[int, ...] = ()) -> None:
    tokens = column([*prompt, *more])
    source.assign(SlotAssignment(slot, 0, tokens, len(prompt), 0, (), sampling))


def outputs(source: TokenSource, slot: int, prompt: int, count: int) -> list[int]:
    """Output tokens of a slot after a prompt of some length."""
    return [int(source.next(np.array([slot]), np.array([prompt + 1 + number]))[0]) for number in range(count)]


def test_random_tokens_follow_from_seed_and_position() -> None:
    source = RandomTokens(4, VOCABULARY)
    seeded = Sampling(temperature=1.0, seed=7)
    assign(source, 0, [1, 2, 3], seeded)
    assign(source, 1, [4, 5, 6], seeded)
    assign(source, 2, [4, 5, 6], Sampling(temperature=1.0, seed=2**64 - 1))
    first, same, other = (outputs(source, slot, 3, 50) for slot in (0, 1, 2))
    assert first == same != other
    assert all(0 <= token < VOCABULARY for token in first)
    assert len(set(first)) > 40
    together = source.next(np.arange(3), np.full(3, 4))
    assert together.tolist() == [first[0], same[0], other[0]]


def test_greedy_tokens_follow_from_the_prompt() -> None:
    source = RandomTokens(4, VOCABULARY)
    assign(source, 0, [1, 2, 3], Sampling(seed=1))
    assign(source, 1, [1, 2, 3], Sampling(seed=2), more=(9, 9))  # after a preemption
    assign(source, 2, [1, 2, 4], Sampling(seed=1))
    first, same, other = (outputs(source, slot, 3, 20) for slot in (0, 1, 2))
    assert first == same != other


@given(stop_ids=st.frozensets(st.integers(0, 19), max_size=19), seed=st.integers(0, 2**64 - 1))
def test_stop_ids_are_never_sampled(stop_ids: frozenset[int], seed: int) -> None:
    source = RandomTokens(2, 20)
    assign(source, 0, [1], Sampling(temperature=1.0, seed=seed, stop_ids=tuple(stop_ids)))
    assign(source, 1, [1], Sampling(temperature=1.0, seed=seed))
    constrained, free = outputs(source, 0, 1, 60), outputs(source, 1, 1, 60)
    assert not stop_ids & set(constrained)
    assert [a for a, b in zip(constrained, free, strict=True) if b not in stop_ids] == [
        token for token in free if token not in stop_ids
    ]
    source.free(np.array([0]))
    assign(source, 0, [1], Sampling(temperature=1.0, seed=seed))
    assert outputs(source, 0, 1, 60) == free


def test_a_vocabulary_of_stop_ids_still_has_a_token() -> None:
    source = RandomTokens(1, 4)
    assign(source, 0, [1], Sampling(stop_ids=(0, 1, 2, 3)))
    assert outputs(source, 0, 1, 5)


def test_an_echo_ends_with_a_stop_id() -> None:
    source = EchoTokens(2, VOCABULARY)
    assign(source, 0, [5, 99, 6, VOCABULARY + 3], Sampling(stop_ids=(99, 98)))
    assert outputs(source, 0, 4, 3) == [5, 6, 99]
    assign(source, 0, [5, 6], Sampling(stop_ids=(99,), min_tokens=5))
    assert outputs(source, 0, 2, 6) == [5, 6, 5, 6, 5, 99]


def test_an_echo_without_an_end_begins_again() -> None:
    source = EchoTokens(2, VOCABULARY)
    assign(source, 1, [5, 6], Sampling())
    assert outputs(source, 1, 2, 5) == [5, 6, 5, 6, 5]
    assign(source, 1, [99], Sampling(stop_ids=(99,)))
    source.free(np.array([1]))
    assert outputs(source, 1, 1, 2) == [0, 99]


@pytest.mark.parametrize(("kind", "expected"), [("random", RandomTokens), ("echo", EchoTokens)])
def test_kinds(kind: str, expected: type) -> None:
    assert isinstance(make_tokens(kind, 1, 10), expected)
