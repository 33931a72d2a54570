"""Checks and words that descriptions of workloads share: whole numbers, lengths in tokens, yes or no."""

from typing import Any

import numpy as np

from bench.errors import BenchError

_MOST = 10**8  # tokens, rows and turns beyond this are a typing error that would take all memory
Length = int | list[int] | tuple[int, int]


def id_range(vocab_size: int | None) -> tuple[int, int]:
    """Ids to draw from: tokenizers keep their special tokens, and bytes, at the low end."""
    if vocab_size is None:
        raise BenchError("random prompts need the size of the vocabulary: give --vocab-size or --tokenizer")
    if vocab_size < 2:
        raise BenchError(f"a vocabulary of {vocab_size} tokens is too small to draw prompts from")
    return min(256, vocab_size // 4), vocab_size


def whole(field: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
        raise BenchError(
            f"workload: {field} must be a whole number of at least {least} and at most {_MOST}, not {value!r}"
        )
    return value


def length(field: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple):
        return (whole(field, value),) * 2
    if len(value) != 2:
        raise BenchError(f"workload: {field} must be a number of tokens or [low, high], not {value!r}")
    low, high = whole(field, value[0]), whole(field, value[1])
    if low > high:
        raise BenchError(f"workload: {field} has its low end {low} above its high end {high}")
    return low, high


def yes_no(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BenchError(f"workload: {field} must be true or false, not {value!r}")
    return value


def draw(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return low if low == high else int(rng.integers(low, high + 1))


def show(bounds: tuple[int, int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low}-{high}"


def plain(bounds: tuple[int, int]) -> int | list[int]:
    low, high = bounds
    return low if low == high else [low, high]
