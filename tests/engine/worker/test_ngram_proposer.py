"""Guesses come from the row's own past, and change nothing in what is said."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.worker.ngram_proposer import CHEAP_TOKENS, LONGEST, SHORTEST, drafts_per_request, propose
from tests.engine.worker.driver import Driver, Request, build_model

few = st.lists(st.integers(0, 2), max_size=40)


def longest_match(tokens: list[int], most: int) -> list[int]:
    """The same in the plainest words."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for begin in range(len(tokens) - length - 1, -1, -1):
            if len(tokens) > length and tokens[begin : begin + length] == tokens[-length:]:
                return tokens[begin + length :][:most]
    return []


@given(few, st.integers(1, 6))
def test_guesses_follow_the_latest_of_the_longest_matches(tokens: list[int], most: int) -> None:
    assert propose(np.array(tokens, dtype=np.int32), most).tolist() == longest_match(tokens, most)


@given(st.integers(1, 8), st.integers(0, 64))
def test_no_more_guesses_than_a_step_bears(most: int, decoding: int) -> None:
    each = drafts_per_request(most, decoding)
    assert 0 <= each <= most
    assert decoding * (1 + each) <= max(CHEAP_TOKENS, decoding)


@pytest.mark.parametrize(("kernels", "block_size"), [("torch", 4), ("auto", 16)])
def test_the_same_tokens_with_and_without_guesses(
    kernels: str, block_size: int, tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    build_model("llama", tmp_path, head_dim=16)
    outputs = []
    for guesses in ({}, {"speculative": "ngram", "num_speculative_tokens": 3}):
        driver = make_driver(tmp_path, block_size=block_size, kernels=kernels, **guesses)
        requests = [Request([5, 6, 7, 8, 5, 6, 7, 8, 5, 6]), Request([1, 2] * 9), Request([9, 9, 9, 9])]
        driver.run(requests, 40, seed=3)
        outputs.append([request.output[:40] for request in requests])
    assert outputs[0] == outputs[1]
    assert driver.drafted > 0, "a model of random weights repeats itself"
