"""Random prompts with the lengths that a trace recorded, one request a row of the trace."""

from typing import Any

import numpy as np

from bench.arrivals import read_trace
from bench.errors import BenchError
from bench.workloads.base import RequestSpec
from bench.workloads.fields import id_range


class TraceLengths:
    """Request i has the lengths of the trace's row i, from the beginning again after its end."""

    def __init__(self, *, vocab_size: int | None, trace: str):
        self._ids = id_range(vocab_size)
        self._path = trace
        recorded = read_trace(trace)
        if recorded.inputs is None or recorded.outputs is None:
            raise BenchError(
                f"{trace}: has no input_tokens and output_tokens: give --input and --output, or --workload"
            )
        self._lengths = list(zip(recorded.inputs, recorded.outputs, strict=True))
        self._stem = recorded.stem

    @property
    def name(self) -> str:
        return f"trace {self._stem}"

    @property
    def max_tokens(self) -> int:
        return max(inputs + outputs for inputs, outputs in self._lengths)

    def describe(self) -> dict[str, Any]:
        return {"kind": "trace", "trace": self._path}

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        specs = []
        for i in range(count):
            inputs, outputs = self._lengths[i % len(self._lengths)]
            ids = rng.integers(*self._ids, size=inputs).tolist()
            specs.append(RequestSpec(input_tokens=inputs, output_tokens=outputs, prompt_ids=ids))
        return specs
