"""Sampling on a device in torch gives the host's tokens for the same logits."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.columns import column
from engine.kernels import sampling, slot_state
from engine.kernels.sampling import Draws
from engine.messages import Sampling, SlotAssignment, StepMessage
from engine.worker import sampler
from engine.worker.slots import WorkerSlots

VOCAB = 700


def params_of(samplings: list[Sampling]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sampling.pack_parameters(one) for one in samplings]))


def host_tokens(logits: torch.Tensor, samplings: list[Sampling], count: int) -> list[int]:
    slots = WorkerSlots(len(samplings), 64, 16)
    known = column([1, 2, *range(count)])
    rows = tuple(SlotAssignment(i, 1, known, 2, 0, (column([1, 2]),), one) for i, one in enumerate(samplings))
    slots.begin_step(StepMessage(0, assigned_slots=rows, chunks=column([[i, 0] for i in range(len(rows))])))
    return sampler.sample(logits.clone(), slots, np.arange(len(samplings))).tokens.tolist()


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    top_k=st.sampled_from([0, 1, 5, 50, 10_000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(samplings, min_size=1, max_size=12), st.integers(0, 100), st.integers(0, 9), st.booleans())
def test_the_device_chooses_the_hosts_tokens(rows: list[Sampling], seed: int, count: int, half: bool) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    logits = logits.bfloat16() if half else logits
    slots = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).int()
    draws = Draws(any(one.temperature > 0 for one in rows), any(one.needs_logits for one in rows))
    counts = torch.full((len(rows),), count, dtype=torch.int32)
    found = sampling.choose_tokens(logits[slots.long()], params_of(rows), slots, counts, draws)
    assert found.dtype == torch.int32
    assert found.tolist() == [host_tokens(logits, rows, count)[slot] for slot in slots.tolist()]


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_numbers_are_those_of_the_host(seed: int) -> None:
    counts = np.arange(100, dtype=np.int32)
    seeds = np.full(100, seed, dtype=np.uint64)
    found = sampling.uniform(torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(counts), torch.float64)
    assert found.tolist() == sampler.uniform(seeds, counts).tolist()


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sampling, "WITHOUT_FLOAT64", ("cpu",))
    sampling.widest_float.cache_clear()
    yield
    sampling.widest_float.cache_clear()


def test_a_device_without_float64_draws_from_the_same_tokens(without_float64: None) -> None:
    rows = [Sampling(temperature=0.8, top_k=4, top_p=0.9, seed=i) for i in range(40)]
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)).expand(40, -1) * 3
    counts, slots = torch.zeros(40, dtype=torch.int32), torch.arange(40, dtype=torch.int32)
    found = sampling.choose_tokens(logits, params_of(rows), slots, counts, Draws(True, True))
    assert sampling.widest_float(logits.device) == torch.float32
    assert found.tolist() == host_tokens(logits, rows, 0)  # no drawn number is near the border of two tokens
    assert 1 < len(set(found.tolist())) <= 4


def test_which_devices_have_float64() -> None:
    assert sampling.widest_float(torch.device("cpu")) == torch.float64
    assert sampling.widest_float(torch.device("mps")) == torch.float32


@pytest.mark.parametrize("values", [{0: float("nan")}, {5: float("inf")}])
def test_a_row_without_weights_gets_the_greedy_token(values: dict[int, Any]) -> None:
    logits = torch.zeros(2, VOCAB)
    for token, value in values.items():
        logits[0, token] = value
    rows = [Sampling(temperature=1.0, top_p=0.9), Sampling(temperature=1.0, seed=3)]
    index = torch.arange(2, dtype=torch.int32)
    found = sampling.choose_tokens(logits, params_of(rows), index, index, Draws(True, True))
    assert int(found[0]) == next(iter(values))
    assert 0 <= int(found[1]) < VOCAB


def test_the_newest_tokens_replace_unknown_ids() -> None:
    last_token, ids = torch.tensor([10, 11, 12], dtype=torch.int32), torch.tensor([-1, 5, -1], dtype=torch.int32)
    slot_state.append_tokens(last_token, torch.tensor([2], dtype=torch.int32), torch.tensor([77], dtype=torch.int32))
    slot_state.gather_ids(ids, last_token, torch.tensor([2, 2, 0], dtype=torch.int32))
    assert ids.tolist() == [77, 5, 10]
    table = torch.zeros(2, 3, dtype=torch.int32)
    rows, columns, values = (torch.tensor(some, dtype=torch.int32) for some in ([1, 0], [2, 0], [8, 9]))
    slot_state.write_elements(table, rows, columns, values)
    assert table.tolist() == [[9, 0, 0], [0, 0, 8]]
