"""Workloads of random token ids: exact lengths, nothing to tokenise, no accidental prefix hits."""

from typing import Any

import numpy as np

from bench.workloads.base import RequestSpec
from bench.workloads.fields import Length, draw, id_range, length, plain, show, whole

DEFAULT_PREFIXES = 4


class RandomTokens:
    """Independent prompts of random ids; a length is fixed or drawn evenly from low..high."""

    def __init__(self, *, vocab_size: int | None, input: Length, output: Length):
        self._ids = id_range(vocab_size)
        self._input = length("input", input)
        self._output = length("output", output)

    @property
    def name(self) -> str:
        return f"{show(self._input)}/{show(self._output)}"

    @property
    def max_tokens(self) -> int:
        return self._input[1] + self._output[1]

    def describe(self) -> dict[str, Any]:
        return {"kind": "random", "input": plain(self._input), "output": plain(self._output)}

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        return [self._request(rng) for _ in range(count)]

    def _request(self, rng: np.random.Generator) -> RequestSpec:
        inputs, outputs = draw(rng, self._input), draw(rng, self._output)
        ids = rng.integers(*self._ids, size=inputs).tolist()
        return RequestSpec(input_tokens=inputs, output_tokens=outputs, prompt_ids=ids)


class SharedPrefix:
    """Each prompt is one of `prefixes` common beginnings, picked evenly, and tokens of its own.

    The beginnings come from the seed too, so that load points don't find each other's in the cache.
    """

    def __init__(
        self, *, vocab_size: int | None, prefix: int, input: Length, output: Length, prefixes: int = DEFAULT_PREFIXES
    ):
        self._ids = id_range(vocab_size)
        self._prefix = whole("prefix", prefix)
        self._prefixes = whole("prefixes", prefixes)
        self._input = length("input", input)
        self._output = length("output", output)

    @property
    def name(self) -> str:
        several = f" x{self._prefixes}" if self._prefixes != DEFAULT_PREFIXES else ""
        return f"shared-prefix {self._prefix}+{show(self._input)}/{show(self._output)}{several}"

    @property
    def max_tokens(self) -> int:
        return self._prefix + self._input[1] + self._output[1]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "shared-prefix",
            "prefix": self._prefix,
            "input": plain(self._input),
            "output": plain(self._output),
            "prefixes": self._prefixes,
        }

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        beginnings = [rng.integers(*self._ids, size=self._prefix).tolist() for _ in range(self._prefixes)]
        return [self._request(rng, beginnings) for _ in range(count)]

    def _request(self, rng: np.random.Generator, beginnings: list[list[int]]) -> RequestSpec:
        inputs, outputs = draw(rng, self._input), draw(rng, self._output)
        beginning = beginnings[int(rng.integers(self._prefixes))]
        ids = beginning + rng.integers(*self._ids, size=inputs).tolist()
        return RequestSpec(input_tokens=len(ids), output_tokens=outputs, prompt_ids=ids)
