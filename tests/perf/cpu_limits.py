"""What the machine allows, measured in the same run: read bandwidth and bf16 matrix products, and a limit from both.

A decode step reads all weights once and the KV cache of every row, and multiplies every row with all weights; whichever
takes longer is its least time. A prompt's tokens are multiplied with the layers' weights, its last one with the
vocabulary's too. Weights and KV cache in bf16; activations and all else cost nothing. Attention's own products, of
queries by keys and weights by values, are counted apart.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tests.perf.child_processes import run_child, start_child

HERE = Path(__file__).parent
BUILD = Path("build") / "perf"
READ_BYTES = 300_000_000
BYTES = 2  # of a bf16

# A line for each line that it reads. In a process of its own: torch's threads must not stay around.
GEMM = """
import sys, time, torch
threads, size, repeats = map(int, sys.argv[1:])
torch.set_num_threads(threads)
a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
out = torch.empty_like(a)
for _ in sys.stdin:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        torch.matmul(a, b, out=out)
        times.append(time.perf_counter() - began)
    print(2 * size**3 / min(times[1:]) / 1e12, flush=True)  # the best: it is to be a limit
"""
GEMM_SIZE, GEMM_REPEATS = 2048, 6


@dataclass(frozen=True, slots=True)
class Machine:
    read_gb_s: float
    gemm_tflop_s: float


def build_probe() -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    source, binary = HERE / "cpu_probe.cpp", BUILD / "cpu_probe"
    if not binary.exists() or binary.stat().st_mtime < source.stat().st_mtime:
        flags = ["-O3", "-march=native", "-std=c++17", "-Wall", "-Wextra", "-pthread"]
        subprocess.run(["g++", *flags, "-o", binary, source], check=True)
    return binary.resolve()


class MachineProbe:
    """Measures the machine whenever it is asked. Its process sleeps in between."""

    def __init__(self, threads: int):
        self._read = [str(build_probe()), str(threads), str(READ_BYTES)]
        gemm = [sys.executable, "-c", GEMM, str(threads), str(GEMM_SIZE), str(GEMM_REPEATS)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self._gemm = start_child(gemm, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, **pipes)
        self.measure()  # the first one waits for imports

    def measure(self) -> Machine:
        read = run_child(self._read, check=True, capture_output=True, text=True, timeout=300).stdout
        assert self._gemm.stdin is not None
        assert self._gemm.stdout is not None
        self._gemm.stdin.write("\n")
        return Machine(float(read), float(self._gemm.stdout.readline()))

    def close(self) -> None:
        self._gemm.communicate()


def measure_machine(threads: int) -> Machine:
    probe = MachineProbe(threads)
    machine = probe.measure()
    probe.close()
    return machine


def mean_of(*machines: Machine) -> Machine:
    """The mean of each figure."""
    return Machine(mean(one.read_gb_s for one in machines), mean(one.gemm_tflop_s for one in machines))


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama-shaped model: parameters that a token is multiplied with, bytes of KV cache, width of attention."""

    layers_parameters: int
    head_parameters: int
    kv_bytes_per_token: int
    attention_width: int  # elements of a token's queries, over all layers

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        c: dict[str, Any] = json.loads((folder / "config.json").read_text())
        hidden, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        width = c.get("head_dim") or hidden // heads
        attention = hidden * width * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * c["intermediate_size"]
        kv = c["num_hidden_layers"] * 2 * kv_heads * width * BYTES
        width *= heads * c["num_hidden_layers"]
        return cls(c["num_hidden_layers"] * layer, c["vocab_size"] * hidden, kv, width)

    def step_s(self, machine: Machine, rows: int, context: float, *, attention: bool = False) -> float:
        """Of decode: each row gets a token, `context` tokens before it. attention: with its own products."""
        parameters = self.layers_parameters + self.head_parameters
        read = parameters * BYTES + rows * context * self.kv_bytes_per_token
        operations = 2 * parameters * rows + attention * self.attention_operations(rows, context, 1)
        return max(read / (machine.read_gb_s * 1e9), operations / (machine.gemm_tflop_s * 1e12))

    def attention_operations(self, rows: int, context: float, tokens: int) -> float:
        """Of `tokens` tokens of each row, which see `context` tokens, themselves and those between."""
        return 4 * self.attention_width * rows * tokens * (context + (tokens + 1) / 2)

    def prefill_s(self, machine: Machine, rows: int, tokens: int) -> float:
        operations = 2 * rows * (tokens * self.layers_parameters + self.head_parameters)
        return operations / (machine.gemm_tflop_s * 1e12)

    def output_tok_s(self, machine: Machine, rows: int, prompt: int, output: int, decode_only: bool) -> float:
        """All rows at once from the start; `decode_only` leaves the prompt and the first token out."""
        steps = output - 1
        decode_s = steps * self.step_s(machine, rows, prompt + output / 2)
        if decode_only:
            return rows * steps / decode_s
        return rows * output / (decode_s + self.prefill_s(machine, rows, prompt))
