"""What the machine allows, measured in the same run: read bandwidth and bf16 matrix products, and a limit from both.

A decode step reads all weights once and the KV cache of every row, and multiplies every row with all weights; whichever
takes longer is its least time. A prompt's tokens are multiplied with the layers' weights, its last one with the
vocabulary's too. Weights and KV cache in bf16; attention's own arithmetic, activations and all else cost nothing.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.perf.child_processes import run_child

HERE = Path(__file__).parent
BUILD = Path("build") / "perf"
READ_BYTES = 300_000_000
BYTES = 2  # of a bf16

# In a process of its own: torch's threads must not stay around.
GEMM = """
import sys, time, torch
threads, size, repeats = map(int, sys.argv[1:])
torch.set_num_threads(threads)
a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
out = torch.empty_like(a)
times = []
for _ in range(repeats + 2):
    began = time.perf_counter()
    torch.matmul(a, b, out=out)
    times.append(time.perf_counter() - began)
print(2 * size**3 / min(times[2:]) / 1e12)  # the best: it is to be a limit
"""
GEMM_SIZE, GEMM_REPEATS = 2048, 15


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


def measure_machine(threads: int) -> Machine:
    read = [str(build_probe()), str(threads), str(READ_BYTES)]
    gemm = [sys.executable, "-c", GEMM, str(threads), str(GEMM_SIZE), str(GEMM_REPEATS)]
    return Machine(_number(read), _number(gemm))


def _number(command: list[str]) -> float:
    return float(run_child(command, check=True, capture_output=True, text=True, timeout=300).stdout.split()[-1])


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama-shaped model: parameters that a token is multiplied with, and bytes of KV cache."""

    layers_parameters: int
    head_parameters: int
    kv_bytes_per_token: int

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        c: dict[str, Any] = json.loads((folder / "config.json").read_text())
        hidden, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        width = c.get("head_dim") or hidden // heads
        attention = hidden * width * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * c["intermediate_size"]
        kv = c["num_hidden_layers"] * 2 * kv_heads * width * BYTES
        return cls(c["num_hidden_layers"] * layer, c["vocab_size"] * hidden, kv)

    def step_s(self, machine: Machine, rows: int, context: float) -> float:
        """Of decode: each row gets a token, `context` tokens before it."""
        parameters = self.layers_parameters + self.head_parameters
        read = parameters * BYTES + rows * context * self.kv_bytes_per_token
        return max(read / (machine.read_gb_s * 1e9), 2 * parameters * rows / (machine.gemm_tflop_s * 1e12))

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
