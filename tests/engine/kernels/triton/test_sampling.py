"""Sampling on the device against `engine.worker.sampler`, and against plain statements of each feature."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.triton import sampling
from engine.kernels.triton.sampling import RUN, SamplingWorkspace, choose_tokens
from engine.messages import Sampling
from engine.worker import sampler
from tests.engine.kernels.triton.numbers import DTYPES, poisoned, random_numbers
from tests.engine.kernels.triton.sampling_case import by_the_cpu, choose, table_of


@triton.jit
def uniform_kernel(seeds, counts, out, n, size: tl.constexpr):
    i = tl.arange(0, size)
    seed = tl.load(seeds + i, mask=i < n, other=0).to(tl.uint64, bitcast=True)
    tl.store(out + i, sampling.uniform(seed, tl.load(counts + i, mask=i < n, other=0)), mask=i < n)


@settings(settings.get_profile("triton"))
@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1)), min_size=1, max_size=256))
def test_numbers_have_the_bits_of_the_cpus(pairs: list[tuple[int, int]]) -> None:
    seeds, counts = np.array([s for s, _ in pairs], dtype=np.uint64), np.array([c for _, c in pairs], dtype=np.int32)
    out = poisoned(256, dtype=torch.float64)
    uniform_kernel[(1,)](torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(counts), out, len(pairs), size=256)
    assert out[: len(pairs)].tolist() == sampler.uniform(seeds, counts).tolist()


rows_of_settings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    top_k=st.sampled_from([0, 1, 5, 50, 10_000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(settings.get_profile("triton"))
@given(
    params=st.lists(rows_of_settings, min_size=1, max_size=3),
    vocab=st.sampled_from([5, 300, RUN, RUN + 1, 2 * RUN + 70, 5 * RUN]),
    padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_tokens_are_the_cpus(params: list[Sampling], vocab: int, padding: int, dtype: torch.dtype, seed: int) -> None:
    logits = random_numbers(len(params), vocab, seed=seed, scale=3).to(dtype)
    counts = [(seed * 7 + i) % 900 for i in range(len(params))]
    assert choose(logits, params, counts, seed, padding) == by_the_cpu(logits, params, counts)


@settings(settings.get_profile("triton"))
@given(
    temperatures=st.lists(st.sampled_from([0.0, 0.5, 1.0, 5.0]), min_size=1, max_size=6),
    vocab=st.sampled_from([40, RUN + 3, 5 * RUN]),
    seed=st.integers(0, 1000),
)
def test_without_filters_two_kernels_choose_the_same(temperatures: list[float], vocab: int, seed: int) -> None:
    params = [Sampling(temperature=t, seed=seed + i) for i, t in enumerate(temperatures)]
    logits, counts = random_numbers(len(params), vocab, seed=seed), list(range(len(params)))
    tokens = choose(logits, params, counts, filtered=False)
    assert tokens == by_the_cpu(logits, params, counts)
    assert tokens == choose(logits, params, counts, filtered=True)


@settings(settings.get_profile("triton"))
@given(
    params=st.lists(rows_of_settings, min_size=2, max_size=4),
    padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_the_order_of_a_batch_changes_no_token(
    params: list[Sampling], padding: int, dtype: torch.dtype, seed: int
) -> None:
    logits = random_numbers(len(params), RUN + 30, seed=seed, scale=3).to(dtype)
    counts = [(seed * 5 + i) % 900 for i in range(len(params))]
    tokens = choose(logits, params, counts, seed)
    order = np.random.default_rng(seed).permutation(len(params)).tolist()
    shuffled = choose(logits[order], [params[i] for i in order], [counts[i] for i in order], seed + 1, padding)
    assert shuffled == [tokens[i] for i in order]


def test_a_row_gets_the_same_token_alone_and_in_any_batch() -> None:
    params = [Sampling(temperature=1.0, top_p=[0.8, 1.0, 1.0][i], top_k=[0, 20, 0][i], seed=i) for i in range(3)]
    logits = random_numbers(3, 1500, seed=3).bfloat16()
    together = choose(logits, params, [4] * 3, padding=2)
    for i, p in enumerate(params):
        assert choose(logits[i : i + 1], [p], [4], seed=i) == together[i : i + 1]


def minimums(logits: Tensor, params: list[Sampling]) -> list[float]:
    slots = np.arange(len(params), dtype=np.int32)
    workspace = SamplingWorkspace.allocate(len(params), logits.shape[1], "cpu")
    out = torch.empty(len(params), dtype=torch.int32)
    choose_tokens(
        logits, table_of(params, slots), torch.from_numpy(slots), torch.zeros_like(out), out, workspace, filtered=True
    )
    return workspace.minimums[:, 0].tolist()


@settings(settings.get_profile("triton"))
@given(
    top_k=st.sampled_from([0, 1, 2, 7, 40, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    levels=st.sampled_from([2, 5, 30, 10**6]),
    vocab=st.sampled_from([60, 2 * RUN, 5 * RUN + 7]),
    seed=st.integers(0, 1000),
)
def test_the_minimum_weight_is_exact_and_keeps_ties(
    top_k: int, top_p: float, min_p: float, levels: int, vocab: int, seed: int
) -> None:
    """`levels`: how many different logits there are; few make ties."""
    p = Sampling(temperature=0.9, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = (random_numbers(1, vocab, seed=seed) * levels / 8).round() * 8 / levels
    weights = sampler.weigh(logits, np.array([0.9], dtype=np.float32))
    limits = sampler._minimum_weights(weights, [p])
    kept = weights[0] >= (0.0 if limits is None else limits[0])
    own = sampler.weigh(logits, np.array([0.9], dtype=np.float32))[0] >= minimums(logits, [p])[0] * (1 - 5e-7)
    assert own.tolist() == kept.tolist()


def test_greedy_takes_the_first_of_equals() -> None:
    logits = random_numbers(3, 3000, seed=1).bfloat16()
    logits[0, [40, 90]] = 50.0
    logits[1, [2999, 1024]] = 50.0
    assert choose(logits, [Sampling()] * 3, [0] * 3) == [40, 1024, int(logits[2].float().argmax())]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_numbers(1, 900, seed=4)
    assert choose(logits, [Sampling(temperature=1e-30, seed=4)], [3]) == [int(logits.argmax())]


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_rows_without_a_finite_highest_logit_get_what_the_cpu_chooses(number: float, limits: dict[str, float]) -> None:
    logits = random_numbers(3, 2100, seed=2)
    logits[0, [1500, 1700]] = number
    logits[1] = number
    logits[2] = -math.inf
    for temperature in (0.0, 1.0):
        params = [Sampling(temperature=temperature, seed=8, **limits)] * 3
        assert choose(logits, params, [0] * 3) == by_the_cpu(logits, params, [0] * 3)


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 5000), -math.inf)
    logits[0, [3, 4650]] = 0.0
    tokens = {choose(logits, [Sampling(temperature=1.0, seed=i)], [0])[0] for i in range(6)}
    assert tokens == {3, 4650}


def test_wrong_arguments_are_refused() -> None:
    one = torch.zeros(1, dtype=torch.int32)
    table, logits = torch.zeros(1, sampling.PARAMETERS, dtype=torch.int32), torch.zeros(1, 2000)
    workspace = SamplingWorkspace.allocate(1, 2000, "cpu")
    with pytest.raises(ValueError, match="not for 1 of 1"):
        choose_tokens(logits[:, :900], table, one, one, one.clone(), workspace, False)
    with pytest.raises(ValueError, match="contiguous"):
        choose_tokens(logits[:, ::2], table, one, one, one.clone(), workspace, False)
    with pytest.raises(ValueError, match="rows of 8 words"):
        choose_tokens(logits, table[:, :5], one, one, one.clone(), workspace, False)
