"""Workloads: exact lengths, the same requests for the same seed, errors that name the field."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BenchError
from bench.workloads import make_workload

seeds = st.integers(0, 2**32 - 1)
lengths = st.one_of(
    st.integers(1, 60), st.tuples(st.integers(1, 30), st.integers(0, 30)).map(lambda p: [p[0], p[0] + p[1]])
)


def bounds(length: int | list[int]) -> tuple[int, int]:
    return (length, length) if isinstance(length, int) else (length[0], length[1])


@given(lengths, lengths, seeds, st.integers(2, 5000), st.integers(1, 12))
def test_random_tokens(inputs: Any, outputs: Any, seed: int, vocab: int, count: int) -> None:
    workload = make_workload({"kind": "random", "input": inputs, "output": outputs}, vocab)
    requests = workload.requests(count, seed)
    assert len(requests) == count
    for request in requests:
        assert request.prompt_ids is not None
        assert request.messages is None
        assert len(request.prompt_ids) == request.input_tokens
        assert bounds(inputs)[0] <= request.input_tokens <= bounds(inputs)[1]
        assert bounds(outputs)[0] <= request.output_tokens <= bounds(outputs)[1]
        assert all(min(256, vocab // 4) <= token < vocab for token in request.prompt_ids)
        assert request.input_tokens + request.output_tokens <= workload.max_tokens
    again = make_workload(workload.describe(), vocab)
    assert again.requests(count + 3, seed)[:count] == requests
    assert again.name == workload.name


@given(st.integers(1, 40), lengths, lengths, st.integers(1, 4), seeds)
def test_shared_prefixes(prefix: int, inputs: Any, outputs: Any, prefixes: int, seed: int) -> None:
    spec = {"kind": "shared-prefix", "prefix": prefix, "input": inputs, "output": outputs, "prefixes": prefixes}
    workload = make_workload(spec, 49152)
    requests = workload.requests(30, seed)
    beginnings = {tuple((request.prompt_ids or [])[:prefix]) for request in requests}
    assert 1 <= len(beginnings) <= prefixes
    for request in requests:
        assert len(request.prompt_ids or []) == request.input_tokens
        assert prefix + bounds(inputs)[0] <= request.input_tokens <= prefix + bounds(inputs)[1]
        assert request.input_tokens + request.output_tokens <= workload.max_tokens
    assert make_workload(workload.describe(), 49152).requests(30, seed) == requests


def test_prefixes_belong_to_the_seed() -> None:
    workload = make_workload({"kind": "shared-prefix", "prefix": 16, "input": 4, "output": 2, "prefixes": 3}, 49152)
    first, second = ({tuple((r.prompt_ids or [])[:16]) for r in workload.requests(40, seed)} for seed in (1, 2))
    assert len(first) == len(second) == 3
    assert not first & second


def test_names() -> None:
    assert make_workload({"kind": "random", "input": 500, "output": 2000}, 1000).name == "500/2000"
    assert make_workload({"kind": "random", "input": [100, 500], "output": 20}, 1000).name == "100-500/20"
    spec = {"kind": "shared-prefix", "prefix": 448, "input": 64, "output": 32}
    assert make_workload({**spec, "prefixes": 4}, 1000).name == "shared-prefix 448+64/32"
    assert make_workload({**spec, "prefixes": 8}, 1000).name == "shared-prefix 448+64/32 x8"
    assert make_workload(spec, 1000).max_tokens == 544


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([], "must have fields"),
        ({"input": 1, "output": 1}, "unknown kind None; choose from random, shared-prefix"),
        ({"kind": "random", "input": 5}, "output is missing"),
        ({"kind": "random", "input": 5, "output": 5, "prefix": 3}, "unknown field prefix"),
        ({"kind": "random", "input": 0, "output": 5}, "input must be an integer"),
        ({"kind": "random", "input": "5", "output": 5}, "input must be an integer"),
        ({"kind": "random", "input": 5, "output": True}, "output must be an integer"),
        ({"kind": "random", "input": [5], "output": 5}, r"input must be a number of tokens or \[low, high\]"),
        ({"kind": "random", "input": [9, 5], "output": 5}, "low 9 exceeds high 5"),
        ({"kind": "shared-prefix", "prefix": 0, "input": 5, "output": 5}, "prefix must be an integer"),
    ],
)
def test_bad_input_is_named(spec: Any, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        make_workload(spec, 1000)


def test_tiny_vocabulary() -> None:
    with pytest.raises(BenchError, match="vocabulary of 1"):
        make_workload({"kind": "random", "input": 5, "output": 5}, 1)
