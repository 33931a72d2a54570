"""Workloads of random token ids: exact lengths, no tokenization, no accidental prefix hits."""

from array import array
from typing import Any

import numpy as np

from bench.workloads.base import RequestSpec
from bench.workloads.fields import Length, draw, id_range, integer, length, length_field, length_text

DEFAULT_PREFIXES = 4


class RandomTokens:
    """Independent prompts of random ids; lengths are fixed or uniform in low..high. Base of the other kinds."""

    kind = "random"

    def __init__(self, *, vocab_size: int | None, input: Length, output: Length):
        self._ids = id_range(vocab_size)
        self._input = length("input", input)
        self._output = length("output", output)

    @property
    def name(self) -> str:
        return f"{length_text(self._input)}/{length_text(self._output)}"

    @property
    def max_tokens(self) -> int:
        return self._input[1] + self._output[1]

    def notes(self) -> list[str]:
        return []

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "input": length_field(self._input), "output": length_field(self._output)}

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        return [self._request(rng, array("i")) for _ in range(count)]

    def _draw(self, rng: np.random.Generator, count: int) -> "array[int]":
        """Ids in four bytes each, since a load point may have 100,000 prompts."""
        return array("i", rng.integers(*self._ids, size=count).astype(np.int32).tobytes())

    def _request(self, rng: np.random.Generator, before: "array[int]") -> RequestSpec:
        """A request with drawn lengths, whose prompt begins with the ids `before`."""
        inputs, outputs = draw(rng, self._input), draw(rng, self._output)
        ids = before + self._draw(rng, inputs)
        return RequestSpec(input_tokens=len(ids), output_tokens=outputs, prompt_ids=ids)


class SharedPrefix(RandomTokens):
    """Each prompt has one of `prefixes` shared prefixes, chosen uniformly, and tokens of its own.

    The prefixes depend on the seed, so that load points do not hit each other's.
    """

    kind = "shared-prefix"

    def __init__(self, *, prefix: int, prefixes: int = DEFAULT_PREFIXES, **lengths: Any):
        super().__init__(**lengths)
        self._prefix = integer("prefix", prefix)
        self._prefixes = integer("prefixes", prefixes)

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
        prefixes = [self._draw(rng, self._prefix) for _ in range(self._prefixes)]
        return [self._request(rng, prefixes[int(rng.integers(self._prefixes))]) for _ in range(count)]
