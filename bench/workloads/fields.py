"""Fields of workload descriptions: checks of their values, and lengths in tokens."""

from typing import Any

import numpy as np

from bench.errors import BenchError

MOST_TOKENS = 10**8  # of one request; also the limit of rows and turns: a typo must not exhaust the memory
Length = int | list[int] | tuple[int, int]


def id_range(vocab_size: int | None) -> tuple[int, int]:
    """The range of ids to draw from, without the lowest ones, where tokenizers have special tokens and bytes."""
    if vocab_size is None:
        raise BenchError("random prompts need the vocabulary size: pass --vocab-size or --tokenizer")
    if vocab_size < 2:
        raise BenchError(f"a vocabulary of {vocab_size} tokens is too small for random prompts")
    return min(256, vocab_size // 4), vocab_size


def integer(field: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST_TOKENS:
        raise BenchError(f"workload: {field} must be an integer from {least} to {MOST_TOKENS}, not {value!r}")
    return value


def repeat_share(value: Any) -> int:
    """The percentage of requests that repeat an earlier one."""
    if integer("repeat", value, least=0) > 100:
        raise BenchError(f"workload: repeat must be a percentage from 0 to 100, not {value} (--repeat)")
    return int(value)


def length(field: str, value: Any) -> tuple[int, int]:
    """The bounds of a length in tokens: a number, or [low, high]."""
    if not isinstance(value, list | tuple):
        return (integer(field, value),) * 2
    if len(value) != 2:
        raise BenchError(f"workload: {field} must be a number of tokens or [low, high], not {value!r}")
    low, high = integer(field, value[0]), integer(field, value[1])
    if low > high:
        raise BenchError(f"workload: {field}: low {low} exceeds high {high}")
    return low, high


def boolean(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BenchError(f"workload: {field} must be true or false, not {value!r}")
    return value


def draw(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    """A length that is drawn uniformly within the bounds."""
    low, high = bounds
    return low if low == high else int(rng.integers(low, high + 1))


def length_text(bounds: tuple[int, int]) -> str:
    """A length in the name of a workload: "500" or "100-200"."""
    low, high = bounds
    return str(low) if low == high else f"{low}-{high}"


def length_field(bounds: tuple[int, int]) -> int | list[int]:
    """A length in the description of a workload: 500 or [100, 200]."""
    low, high = bounds
    return low if low == high else [low, high]
