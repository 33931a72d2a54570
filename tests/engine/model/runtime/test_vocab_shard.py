"""Ranks that divide the vocabulary choose what one rank would."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from engine.model.runtime.vocab_shard import Float64s, Int64s, VocabShard, shard_embedding
from engine.worker.sampler import pick, weigh
from tests.engine.model.sharding.thread_groups import make_groups


def slices(size: int, total: int) -> list[VocabShard]:
    parts = [VocabShard(total, group) for group in make_groups(size)]
    assert sum(part.count for part in parts) == total
    assert all(part.first + part.count == after.first for part, after in itertools.pairwise(parts))
    return parts


def choose_one(part: VocabShard, logits: torch.Tensor, temperatures: NDArray[np.float32], numbers: Float64s) -> Int64s:
    mine = logits[:, part.first : part.first + part.count]
    weights = weigh(mine, np.where(temperatures == 0, 1, temperatures).astype(np.float32)).sum(1).numpy()

    def draw(rows: Int64s, inner: Float64s) -> Int64s:
        return pick(weigh(mine[torch.from_numpy(rows)], temperatures[rows]), inner)

    return part.choose((mine.amax(1).numpy(), mine.numpy().argmax(1), weights), temperatures, numbers, draw)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(8, 40), st.integers(1, 5), st.integers(0, 1 << 30))
def test_the_choice_is_that_of_one_rank(size: int, total: int, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.integers(-3, 4, (rows, total)).astype(np.float32))  # with ties
    temperatures = random.choice(np.array([0, 0.5, 1, 20], dtype=np.float32), rows)
    numbers = random.random(rows)
    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(lambda part: choose_one(part, logits, temperatures, numbers), slices(size, total)))
    assert all((tokens == found[0]).all() for tokens in found)
    for token, line, temperature, number in zip(found[0], logits.numpy(), temperatures, numbers, strict=True):
        if temperature == 0:
            assert token == line.argmax()
            continue
        weights = np.exp((line - line.max()) / float(temperature))
        edges = weights.cumsum() / weights.sum()
        assert edges[token] - weights[token] / weights.sum() - 1e-5 <= number <= edges[token] + 1e-5


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(8, 40))
def test_logits_are_gathered_and_tokens_embedded(size: int, total: int) -> None:
    torch.manual_seed(size)
    whole = nn.Embedding(total, 6).requires_grad_(False)
    logits, ids = torch.randn(3, total), torch.randint(total, (1, 9))

    def run(part: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = nn.Embedding(part.count, 6).requires_grad_(False)
        embedding.weight.copy_(whole.weight[part.first : part.first + part.count])
        shard_embedding(embedding, part)
        return part.gather(logits[:, part.first : part.first + part.count]), embedding(ids)

    with ThreadPoolExecutor(size) as pool:
        for gathered, embedded in pool.map(run, slices(size, total)):
            assert torch.equal(gathered, logits)
            assert torch.equal(embedded, whole(ids))
