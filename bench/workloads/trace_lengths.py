"""Random prompts with the lengths and the shared prefixes of a trace: one request per row of the trace."""

import hashlib
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.workloads.base import RequestSpec
from bench.workloads.fields import Length, boolean, draw, id_range, length, length_field, length_text
from bench.workloads.traces import read_trace


class TraceLengths:
    """Request i has the lengths of the trace's row i; after its end the trace is repeated.

    If the trace has hash ids, prompts have equal tokens where they have equal ids. The tokens depend on the seed and on
    the pass through the trace, so neither load points nor passes share prefixes. `input` and `output` replace recorded
    lengths; `input` also replaces the shared prefixes.
    """

    def __init__(
        self,
        *,
        vocab_size: int | None,
        trace: str,
        trace_unit: str = "auto",
        skip_bad_rows: bool = False,
        input: Length | None = None,
        output: Length | None = None,
    ):
        self._ids = id_range(vocab_size)
        self._spec: dict[str, Any] = {"trace": trace}
        self._spec |= {"trace_unit": trace_unit} if trace_unit != "auto" else {}
        self._spec |= {"skip_bad_rows": True} if boolean("skip_bad_rows", skip_bad_rows) else {}
        self._trace = read_trace(trace, trace_unit, skip_bad_rows)
        self._input = None if input is None else length("input", input)
        self._output = None if output is None else length("output", output)
        for field, recorded, own in (
            ("input", self._trace.inputs, self._input),
            ("output", self._trace.outputs, self._output),
        ):
            if recorded is None and own is None:
                unused = ", ".join(self._trace.unused) or "none"
                raise BenchError(
                    f"{trace} has no column {field}_tokens (unknown columns: {unused}): pass --{field}, or rename the "
                    "column"
                )

    @property
    def name(self) -> str:
        replaced = [f" {field} {length_text(own)}" for field, own in self._replaced() if own is not None]
        return f"trace {self._trace.stem}{''.join(replaced)}"

    @property
    def max_tokens(self) -> int:
        highest = [0] * len(self._trace.times)
        for recorded, own in ((self._trace.inputs, self._input), (self._trace.outputs, self._output)):
            tokens = recorded if own is None else [own[1]] * len(highest)
            assert tokens is not None
            highest = [a + b for a, b in zip(highest, tokens, strict=True)]
        return max(highest)

    def notes(self) -> list[str]:
        return [line for line in (self._trace.summary(), self._trace.skipped) if line]

    def describe(self) -> dict[str, Any]:
        replaced = {field: length_field(own) for field, own in self._replaced() if own is not None}
        return {"kind": "trace"} | self._spec | replaced

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        blocks: dict[tuple[int, Any], list[int]] = {}
        specs = []
        for i in range(count):
            cycle, row = divmod(i, len(self._trace.times))
            inputs = self._trace.inputs[row] if self._input is None else draw(rng, self._input)  # type: ignore[index]
            outputs = self._trace.outputs[row] if self._output is None else draw(rng, self._output)  # type: ignore[index]
            ids: list[int] = []
            for hash_id in self._trace.hash_ids[row] if self._trace.hash_ids and self._input is None else ():
                if (cycle, hash_id) not in blocks:
                    blocks[cycle, hash_id] = self._block(seed, cycle, hash_id)
                ids += blocks[cycle, hash_id]
            ids = ids[:inputs] + rng.integers(*self._ids, size=max(0, inputs - len(ids))).tolist()
            specs.append(RequestSpec(input_tokens=inputs, output_tokens=outputs, prompt_ids=ids))
        return specs

    def _block(self, seed: int, cycle: int, hash_id: int | str) -> list[int]:
        key = hashlib.blake2b(f"{seed}|{cycle}|{hash_id!r}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(key, "big"))
        ids: list[int] = rng.integers(*self._ids, size=self._trace.block_tokens).tolist()
        return ids

    def _replaced(self) -> tuple[tuple[str, tuple[int, int] | None], ...]:
        return ("input", self._input), ("output", self._output)
