"""Workloads of random token ids: exact lengths, nothing to tokenise, no accidental prefix hits."""

from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.workloads.base import RequestSpec

Length = int | list[int] | tuple[int, int]

DEFAULT_PREFIXES = 4


class RandomTokens:
    """Independent prompts of random ids; a length is fixed or drawn evenly from low..high."""

    def __init__(self, *, vocab_size: int, input: Length, output: Length):
        self._ids = _id_range(vocab_size)
        self._input = _length("input", input)
        self._output = _length("output", output)

    @property
    def name(self) -> str:
        return f"{_show(self._input)}/{_show(self._output)}"

    @property
    def max_tokens(self) -> int:
        return self._input[1] + self._output[1]

    def describe(self) -> dict[str, Any]:
        return {"kind": "random", "input": _plain(self._input), "output": _plain(self._output)}

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        return [self._request(rng) for _ in range(count)]

    def _request(self, rng: np.random.Generator) -> RequestSpec:
        inputs, outputs = _draw(rng, self._input), _draw(rng, self._output)
        ids = rng.integers(*self._ids, size=inputs).tolist()
        return RequestSpec(input_tokens=inputs, output_tokens=outputs, prompt_ids=ids)


class SharedPrefix:
    """Each prompt is one of `prefixes` common beginnings, picked evenly, and tokens of its own.

    The beginnings come from the seed too, so that load points don't find each other's in the cache.
    """

    def __init__(
        self, *, vocab_size: int, prefix: int, input: Length, output: Length, prefixes: int = DEFAULT_PREFIXES
    ):
        self._ids = _id_range(vocab_size)
        self._prefix = _whole("prefix", prefix)
        self._prefixes = _whole("prefixes", prefixes)
        self._input = _length("input", input)
        self._output = _length("output", output)

    @property
    def name(self) -> str:
        several = f" x{self._prefixes}" if self._prefixes != DEFAULT_PREFIXES else ""
        return f"shared-prefix {self._prefix}+{_show(self._input)}/{_show(self._output)}{several}"

    @property
    def max_tokens(self) -> int:
        return self._prefix + self._input[1] + self._output[1]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "shared-prefix",
            "prefix": self._prefix,
            "input": _plain(self._input),
            "output": _plain(self._output),
            "prefixes": self._prefixes,
        }

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        beginnings = [rng.integers(*self._ids, size=self._prefix).tolist() for _ in range(self._prefixes)]
        return [self._request(rng, beginnings) for _ in range(count)]

    def _request(self, rng: np.random.Generator, beginnings: list[list[int]]) -> RequestSpec:
        inputs, outputs = _draw(rng, self._input), _draw(rng, self._output)
        beginning = beginnings[int(rng.integers(self._prefixes))]
        ids = beginning + rng.integers(*self._ids, size=inputs).tolist()
        return RequestSpec(input_tokens=len(ids), output_tokens=outputs, prompt_ids=ids)


def _id_range(vocab_size: int) -> tuple[int, int]:
    """Ids to draw from: tokenizers keep their special tokens, and bytes, at the low end."""
    if vocab_size < 2:
        raise BenchError(f"a vocabulary of {vocab_size} tokens is too small to draw prompts from")
    return min(256, vocab_size // 4), vocab_size


def _whole(field: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BenchError(f"workload: {field} must be a whole number of at least 1, not {value!r}")
    return value


def _length(field: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple):
        return (_whole(field, value),) * 2
    if len(value) != 2:
        raise BenchError(f"workload: {field} must be a number of tokens or [low, high], not {value!r}")
    low, high = _whole(field, value[0]), _whole(field, value[1])
    if low > high:
        raise BenchError(f"workload: {field} has its low end {low} above its high end {high}")
    return low, high


def _draw(rng: np.random.Generator, length: tuple[int, int]) -> int:
    low, high = length
    return low if low == high else int(rng.integers(low, high + 1))


def _show(length: tuple[int, int]) -> str:
    low, high = length
    return str(low) if low == high else f"{low}-{high}"


def _plain(length: tuple[int, int]) -> int | list[int]:
    low, high = length
    return low if low == high else [low, high]
