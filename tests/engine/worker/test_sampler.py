"""Sampling: each feature against a plain statement of it, and independence of the batch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as replaced

from engine.columns import column, float32s, int32s
from engine.messages import Sampling, SlotAssignment, StepMessage
from engine.worker import sampler
from engine.worker.slots import WorkerSlots

VOCAB = 700  # not a multiple of the runs that drawing sums over


def make_slots(
    params: list[Sampling], outputs: list[list[int]] | None = None, prompt: tuple[int, ...] = (1, 2)
) -> WorkerSlots:
    slots = WorkerSlots(len(params), 64, 16)
    added = []
    for i, p in enumerate(params):
        tokens = [*prompt, *(outputs[i] if outputs else [])]
        added.append(SlotAssignment(i, 1, column(tokens), len(prompt), 0, (column([1, 2, 3, 4]),), p))
    slots.begin_step(StepMessage(0, assigned_slots=tuple(added), chunks=column([[i, 0] for i in range(len(params))])))
    return slots


def sample(logits: torch.Tensor, params: list[Sampling], outputs: list[list[int]] | None = None) -> sampler.Sampled:
    with torch.inference_mode():
        return sampler.sample(logits, make_slots(params, outputs), np.arange(len(params)))


def random_logits(rows: int, seed: int, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


settings_of_rows = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    top_k=st.sampled_from([0, 1, 5, 50, 10_000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from([-1, 0, 3]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(settings_of_rows, min_size=2, max_size=40), st.integers(0, 100), st.booleans())
def test_a_row_samples_the_same_alone_and_in_any_batch(params: list[Sampling], seed: int, half: bool) -> None:
    logits = random_logits(len(params), seed).to(torch.bfloat16 if half else torch.float32)
    outputs = [[(seed + i) % VOCAB, 7] for i in range(len(params))]
    together = sample(logits.clone(), params, outputs)
    for i, p in enumerate(params):
        assert sample(logits[i : i + 1].clone(), [p], outputs[i : i + 1]).tokens[0] == together.tokens[i]


def kept(logits: torch.Tensor, p: Sampling) -> set[int]:
    """The tokens that filters leave, by the book: min_p, then top_k, then the smallest set that reaches top_p."""
    probs = torch.softmax(logits.double() / p.temperature, -1)
    order = torch.argsort(probs, descending=True).tolist()
    order = [token for token in order if probs[token] >= p.min_p * probs.max()]
    if p.top_k:
        order = order[: p.top_k]
    whole, total, result = sum(float(probs[token]) for token in order), 0.0, set[int]()
    for token in order:
        result.add(token)
        total += float(probs[token])
        if total >= p.top_p * whole:
            break
    return result


@pytest.mark.parametrize(
    "limits",
    [
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.8},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.02},
        {"top_p": 0.99},
    ],
)
def test_filters_leave_exactly_the_tokens_of_the_book(limits: dict[str, Any]) -> None:
    p = Sampling(temperature=1.5, **limits)
    logits = random_logits(1, 5, vocab=60)
    draws = 4000
    tokens = {int(sampler.draw(logits, [p], np.array([(i + 0.5) / draws]))[0]) for i in range(draws)}
    rare = {int(i) for i in torch.nonzero(torch.softmax(logits[0] / 1.5, -1) < 2 / draws)}
    expected = kept(logits[0], p)
    assert tokens <= expected
    assert tokens | rare >= expected


def test_top_p_over_a_flat_distribution_keeps_its_share() -> None:
    vocab = 3000
    logits = torch.zeros(1, vocab) + torch.linspace(0, -0.01, vocab)
    p = Sampling(temperature=1.0, top_p=0.9)
    least = sampler._minimum_weights((logits - logits.amax()).exp(), [p])
    assert least is not None
    count = int(((logits - logits.amax()).exp() >= least[:, None]).sum())
    assert count == pytest.approx(0.9 * vocab, rel=0.01)


def test_draws_follow_the_distribution() -> None:
    logits = random_logits(1, 3, vocab=300)
    draws = 20_000
    numbers = (np.arange(draws) + 0.5) / draws
    p = Sampling(temperature=0.8)
    tokens = np.concatenate(
        [sampler.draw(logits.expand(500, -1), [p] * 500, numbers[i : i + 500]) for i in range(0, draws, 500)]
    )
    share = np.bincount(tokens, minlength=300) / draws
    expected = torch.softmax(logits[0].double() / 0.8, -1).numpy()
    assert np.abs(share - expected).max() < 2 / draws


def test_the_ends_of_the_interval_draw_possible_tokens() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    logits[0, [3, 650]] = 0.0
    p = Sampling(temperature=1.0)
    assert sampler.draw(logits, [p], np.array([0.0]))[0] == 3
    assert sampler.draw(logits, [p], np.array([math.nextafter(1.0, 0.0)]))[0] == 650


def test_numbers_are_uniform_and_differ_between_seeds_and_counts() -> None:
    seeds, counts = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(50), indexing="ij")
    numbers = sampler.uniform(seeds, counts)
    assert len(np.unique(numbers)) == numbers.size
    assert ((numbers >= 0) & (numbers < 1)).all()
    for axis in (0, 1):
        assert np.abs(numbers.mean(axis) - 0.5).max() < 0.2
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.05


def test_the_draw_depends_on_seed_and_output_length_alone() -> None:
    logits = torch.zeros(1, VOCAB)
    p = Sampling(temperature=1.0, seed=11)
    first = sample(logits, [p], [[5, 6]]).tokens[0]
    assert first == sample(logits, [p], [[8, 9]]).tokens[0]
    assert first != sample(logits, [p], [[5, 6, 7]]).tokens[0]
    assert first != sample(logits, [replaced(p, seed=12)], [[5, 6]]).tokens[0]


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = random_logits(70, 1).to(torch.bfloat16)
    logits[3, [40, 90]] = 50.0
    tokens = sample(logits, [Sampling()] * 70).tokens
    assert tokens.tolist() == [int(row.float().argmax()) if i != 3 else 40 for i, row in enumerate(logits)]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = random_logits(1, 4)
    assert sample(logits, [Sampling(temperature=1e-30, seed=4)]).tokens[0] == int(logits.argmax())


def test_stop_ids_are_barred_until_min_tokens() -> None:
    logits = random_logits(1, 2)
    best = int(logits.argmax())
    p = Sampling(min_tokens=2, stop_ids=(best, VOCAB + 5))
    assert sample(logits.clone(), [p], [[4]]).tokens[0] != best
    assert sample(logits.clone(), [p], [[4, 4]]).tokens[0] == best


def test_penalties_and_bias_move_the_logits_as_stated() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([2.0, 1.9, 1.8, -1.0])
    outputs = [[0, 0, 1]]
    cases = {
        0: Sampling(),
        1: Sampling(frequency_penalty=0.5),  # 1.0, 1.4, 1.8, but 1 and 2 are in the way below
        2: Sampling(presence_penalty=0.5),
        600: Sampling(logit_bias=((600, 5.0), (VOCAB + 1, 9.0))),
    }
    assert sample(logits.clone(), [cases[0]], outputs).tokens[0] == 0
    assert sample(logits.clone(), [cases[1]], outputs).tokens[0] == 2
    assert sample(logits.clone(), [cases[2]], outputs).tokens[0] == 2
    assert sample(logits.clone(), [cases[600]], outputs).tokens[0] == 600
    # The prompt (1, 2) counts for the repetition penalty, and a negative logit is multiplied.
    repeated = Sampling(repetition_penalty=4.0)
    logits[0] = -9.0
    logits[0, [1, 5]] = torch.tensor([-0.5, -1.9])
    assert sample(logits.clone(), [repeated], outputs).tokens[0] == 5


def test_the_models_own_logits_are_left_alone() -> None:
    logits = random_logits(2, 9)
    before = logits.clone()
    sample(logits, [Sampling(logit_bias=((3, 50.0),)), Sampling(temperature=1.0)])
    assert torch.equal(logits, before)


def test_logprobs_are_the_models_before_any_change() -> None:
    logits = random_logits(3, 8)
    best = int(logits[2].argmax())
    params = [Sampling(), Sampling(logprobs=0, temperature=1.0, seed=1), Sampling(logprobs=4, logit_bias=((9, 80.0),))]
    result = sample(logits.clone(), params)
    assert result.logprobs is not None
    table = result.logprobs
    expected = torch.log_softmax(logits, -1)
    ids, values = int32s(table.ids, table.width), float32s(table.values, table.width)
    assert table.width == 5
    assert int32s(table.index).tolist() == [1, 2]
    assert ids[:, 0].tolist() == result.tokens[1:].tolist()
    assert result.tokens[2] == 9
    assert ids[1, 1] == best
    np.testing.assert_allclose(values[1, 1:], torch.topk(expected[2], 4).values.numpy(), rtol=1e-5)
    np.testing.assert_allclose(values[:, 0], [expected[1, result.tokens[1]], expected[2, 9]], rtol=1e-5)
    ranks = int32s(table.ranks).tolist()
    assert ranks == [
        int((expected[i] > expected[i, t]).sum()) + 1 for i, t in zip((1, 2), result.tokens[1:], strict=True)
    ]


def test_no_logprobs_cost_no_bytes() -> None:
    assert sample(random_logits(2, 1), [Sampling(), Sampling(temperature=1.0)]).logprobs is None


FILTERS = [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"logprobs": 2}]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_would_be_left_min_tokens_and_then_bad_words_give_way(
    filters: dict[str, Any], temperature: float
) -> None:
    logits, everything = random_logits(1, 3), tuple(range(VOCAB))
    asked = {"temperature": temperature, "seed": 5, **filters}
    free = sample(logits.clone(), [Sampling(**asked)]).tokens[0]
    for stopped in (
        Sampling(min_tokens=4, stop_ids=everything, **asked),
        Sampling(bad_words=tuple((token,) for token in everything), **asked),
    ):
        assert sample(logits.clone(), [stopped]).tokens[0] == free
    one = Sampling(min_tokens=4, stop_ids=(9,), allowed=column([9]), **asked)
    assert sample(logits.clone(), [one]).tokens[0] == 9
    two = Sampling(min_tokens=4, stop_ids=(9,), bad_words=((8,),), allowed=column([8, 9]), **asked)
    assert sample(logits.clone(), [two]).tokens[0] == 9, "min_tokens gives way before a bad word does"


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_none_end_nobody(filters: dict[str, Any], number: float) -> None:
    logits = random_logits(2, 1)
    logits[0, 5:] = number
    params = [Sampling(temperature=1.0, seed=1, **filters), Sampling(temperature=1.0, top_k=9, seed=2)]
    found = sample(logits.clone(), params).tokens
    assert 0 <= found[0] < VOCAB
    assert found[1] == sample(logits[1:], params[1:]).tokens[0]
