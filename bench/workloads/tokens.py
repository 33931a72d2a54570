"""Workloads of random token ids: exact lengths, nothing to tokenise, no accidental prefix hits."""

from typing import Any

import numpy as np

from bench.workloads.base import RequestSpec
from bench.workloads.fields import Length, draw, id_range, length, plain, show, whole

DEFAULT_PREFIXES = 4


class RandomTokens:
    """Independent prompts of random ids; a length is fixed or drawn evenly from low..high.

    Also the base of other kinds, which make more of the same drawn lengths and ids.
    """

    kind = "random"

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

    def notes(self) -> list[str]:
        return []

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "input": plain(self._input), "output": plain(self._output)}

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        return [self._request(rng, []) for _ in range(count)]

    def _draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """So many ids."""
        ids: list[int] = rng.integers(*self._ids, size=count).tolist()
        return ids

    def _request(self, rng: np.random.Generator, before: list[int]) -> RequestSpec:
        """A request of drawn lengths; its prompt follows after the ids given."""
        inputs, outputs = draw(rng, self._input), draw(rng, self._output)
        ids = before + self._draw(rng, inputs)
        return RequestSpec(input_tokens=len(ids), output_tokens=outputs, prompt_ids=ids)


class SharedPrefix(RandomTokens):
    """Each prompt is one of `prefixes` common beginnings, picked evenly, and tokens of its own.

    The beginnings come from the seed too, so that load points don't find each other's in the cache.
    """

    kind = "shared-prefix"

    def __init__(self, *, prefix: int, prefixes: int = DEFAULT_PREFIXES, **lengths: Any):
        super().__init__(**lengths)
        self._prefix = whole("prefix", prefix)
        self._prefixes = whole("prefixes", prefixes)

    @property
    def name(self) -> str:
        several = f" x{self._prefixes}" if self._prefixes != DEFAULT_PREFIXES else ""
        return f"shared-prefix {self._prefix}+{super().name}{several}"

    @property
    def max_tokens(self) -> int:
        return self._prefix + super().max_tokens

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"prefix": self._prefix, "prefixes": self._prefixes}

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        beginnings = [self._draw(rng, self._prefix) for _ in range(self._prefixes)]
        return [self._request(rng, beginnings[int(rng.integers(self._prefixes))]) for _ in range(count)]
