"""Choice of tokens over shards of the vocabulary against the choice over all logits at once."""

import pytest
import torch
from torch import Tensor

from engine.kernels.triton import sampling, sampling_shards
from engine.kernels.triton.sampling import RUN, SamplingWorkspace
from engine.kernels.triton.sampling_shards import choose_own, runs_of, sum_runs
from engine.messages import Sampling
from tests.engine.kernels.triton.numbers import poisoned, random_numbers
from tests.engine.kernels.triton.sampling_case import MANY_SLOTS, table_of

GREEDY, DRAWN = Sampling(), [Sampling(temperature=0.8 + 0.3 * i, seed=i) for i in range(12)]


def shards(vocabulary: int, ranks: int) -> list[tuple[int, int]]:
    """First token and number of tokens of each rank; the first ranks have one more."""
    each, more = divmod(vocabulary, ranks)
    return [(rank * each + min(rank, more), each + (rank < more)) for rank in range(ranks)]


def choose(logits: Tensor, params: list[Sampling], ranks: int, padding: int = 0) -> list[int]:
    """The tokens that all ranks together choose, with padded rows behind the others."""
    rows = len(logits)
    slots = torch.full((rows + padding,), -1, dtype=torch.int32)
    slots[:rows] = torch.randperm(MANY_SLOTS)[:rows].int()
    table, counts = table_of(params, slots[:rows].numpy()), torch.arange(rows + padding, dtype=torch.int32)
    padded = torch.cat([logits, poisoned(padding, logits.shape[1], dtype=logits.dtype)])
    parts = shards(logits.shape[1], ranks)
    runs = runs_of(parts[0][1])
    own = [poisoned(3, rows + padding, runs, dtype=torch.int32) for _ in parts]
    for (first, count), sums in zip(parts, own, strict=True):
        sum_runs(padded[:, first : first + count], table, slots, sums)
    of_all, chosen = torch.cat(own, -1), []
    for rank, (first, count) in enumerate(parts):
        out = torch.zeros(rows + padding, dtype=torch.int32)
        part = padded[:, first : first + count]
        choose_own(part, table, slots, counts, of_all, (rank * runs, runs), first, out)
        chosen.append(out)
    assert not torch.stack(chosen)[:, rows:].any(), "padding has no tokens"
    assert (torch.stack(chosen) > 0).sum(0)[:rows].max() <= 1, "one rank chooses"
    return torch.stack(chosen).sum(0)[:rows].tolist()


def at_once(logits: Tensor, params: list[Sampling]) -> list[int]:
    rows, vocabulary = logits.shape
    slots, out = torch.arange(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
    workspace = SamplingWorkspace.allocate(rows, vocabulary, "cpu")
    table = table_of(params, slots.numpy())
    sampling.choose_tokens(logits, table, slots, slots, out, workspace, False)
    return out.tolist()


@pytest.mark.parametrize(
    ("vocabulary", "ranks"), [(2 * RUN, 2), (2 * RUN + 1, 2), (3 * RUN - 5, 4), (7, 2), (5 * RUN + 3, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_shards_give_the_tokens_of_the_whole(vocabulary: int, ranks: int, dtype: torch.dtype) -> None:
    params = [GREEDY, *DRAWN[:6], GREEDY]
    logits = random_numbers(len(params), vocabulary, seed=vocabulary, scale=3).to(dtype)
    assert choose(logits, params, ranks, padding=2) == at_once(logits, params)


def test_tokens_are_drawn_as_often_as_their_weights_say() -> None:
    """Two tokens of different ranks, of which one weighs three times as much."""
    logits = torch.full((1, 8), -torch.inf)
    logits[0, 1], logits[0, 6] = 0.0, torch.tensor(3.0).log()
    drawn = [choose(logits, [Sampling(temperature=1.0, seed=seed)], 2)[0] for seed in range(60)]
    assert set(drawn) == {1, 6}
    assert 33 <= drawn.count(6) <= 56


def test_the_first_of_equal_tokens_is_greedy() -> None:
    logits = torch.zeros(2, 10)
    logits[1, [4, 5, 9]] = 1.0
    assert choose(logits, [GREEDY] * 2, 2) == [0, 4]


def test_rows_that_can_not_be_drawn_have_the_token_of_the_whole() -> None:
    logits = torch.zeros(3, 12)
    logits[0, 8], logits[1, 3], logits[2, 11] = torch.inf, torch.nan, torch.nan
    params = DRAWN[:3]
    assert choose(logits, params, 2) == at_once(logits, params) == [8, 3, 11]


def test_sums_must_be_contiguous() -> None:
    sums = torch.zeros(3, 2, 4, dtype=torch.int32)[:, :, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        sampling_shards.sum_runs(torch.zeros(2, 8), torch.zeros(2, 8).int(), torch.zeros(2).int(), sums)
