"""Attention of the fused stack over head sizes, blocks and windows: on vectors, and on tiles in software."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.engine.kernels.cpu import test_stack
from tests.engine.kernels.cpu.test_stack import ISAS, SOFTWARE, Served, Shape

software_tiles = test_stack.software_tiles
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU kernels need AVX2")

TOKENS, BLOCKS = 290, 60


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads, and the cache that they read."""

    block_size: int
    head_dim: int
    kv_heads: int
    group: int  # query heads of a kv head
    window: int | None = None


CASES = [
    Case(16, 64, 3, 3),
    Case(32, 64, 2, 1),
    Case(32, 96, 1, 5, window=70),
    Case(64, 48, 2, 12),
    Case(64, 256, 1, 2, window=130),
    Case(128, 128, 1, 33),
]
CACHES = ["bfloat16", "int8"]


@functools.cache
def served(isa: str, cache: str, case: Case) -> Served:
    shape = Shape("mistral", 32, case.kv_heads, case.group, case.head_dim, 32, 60, case.window)
    return Served(shape, torch.bfloat16, case.block_size, isa, BLOCKS, "", cache)


def tokens(count: int) -> NDArray[np.integer]:
    return np.random.default_rng(count).integers(0, 60, count)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("isa", [*ISAS[:1], SOFTWARE])
def test_the_same_bits_alone_in_a_batch_and_in_chunks(isa: str, cache: str, case: Case) -> None:
    stack = served(isa, cache, case)
    ids = tokens(TOKENS)
    alone = stack.run([(ids, 0, stack.blocks_for(TOKENS, 1))], every=True)
    blocks, begin = stack.blocks_for(TOKENS, 20), 0
    for cut in (3, 4, 37, 130, 131, 258, TOKENS):
        neighbor = tokens(cut % 50 + 1)
        found = stack.run(
            [(neighbor, 0, stack.blocks_for(len(neighbor), 40)), (ids[begin:cut], begin, blocks)], every=True
        )
        assert (found[len(neighbor) :] == alone[begin:cut]).all()
        begin = cut


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_tiles_and_vectors_differ_only_in_rounding(cache: str, case: Case) -> None:
    ids = tokens(TOKENS)
    on_tiles, on_vectors = (
        stack.run([(ids, 0, stack.blocks_for(TOKENS, 1))], every=True)
        for stack in (served(isa, cache, case) for isa in (SOFTWARE, ISAS[0]))
    )
    error = np.sqrt(np.mean((on_tiles - on_vectors) ** 2) / np.mean(on_vectors**2))
    assert error < 0.01


@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_infinities_behind_a_rows_end_do_no_harm(block_size: int) -> None:
    """A tile reads the values of 32 tokens, some of which another row may have left."""
    stack = served(SOFTWARE, "bfloat16", Case(block_size, 64, 2, 1))
    ids, blocks = tokens(50), stack.blocks_for(50, 1)
    clean = stack.run([(ids, 0, blocks)], every=True)
    test_stack.fill_values(stack, BLOCKS, blocks, 0x7F80)
    found = [stack.run([(ids[begin:end], begin, blocks)], every=True) for begin, end in ((0, 1), (1, 34), (34, 50))]
    assert (np.concatenate(found) == clean).all()
