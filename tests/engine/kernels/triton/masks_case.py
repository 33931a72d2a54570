"""A check of masks over the vocabulary, for tests on the CPU and on a GPU."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.engine.kernels.triton.numbers import poisoned, random_numbers


def random_words(random: np.random.Generator, masks: int, vocabulary: int) -> NDArray[np.int32]:
    """Masks with a bit more than the vocabulary, as the core makes them."""
    words = vocabulary // 32 + 1
    return random.integers(-(2**31), 2**31, (masks, words), dtype=np.int64).astype(np.int32)


def check_masks(
    exclude: Callable[[Tensor, Tensor, Tensor], None],
    rows: int,
    masks: int,
    vocabulary: int,
    dtype: torch.dtype,
    seed: int,
    device: torch.device | str,
) -> Tensor:
    """Compare with numpy; the logits are a view of something wider, which must not change."""
    random = np.random.default_rng(seed)
    memory = poisoned(rows, vocabulary + 3, dtype=dtype)
    memory[:, :vocabulary] = random_numbers(rows, vocabulary, seed=seed).to(dtype)
    at = random.permutation(rows)[:masks].astype(np.int32)
    words = random_words(random, masks, vocabulary)
    expected = memory.clone()
    for row, mask in zip(at, words, strict=True):
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocabulary].astype(np.bool_)
        expected[row, :vocabulary][torch.from_numpy(~allowed)] = -torch.inf
    found = memory.to(device)
    exclude(found[:, :vocabulary], torch.from_numpy(at).to(device), torch.from_numpy(words).to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    return found
