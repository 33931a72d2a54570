"""`make rooflines`: the least time of each kernel and of each step of Llama-3.1-8B on one H100, from bytes and FLOPs.

A computation, not a measurement. A kernel's limit is the longer of its bytes at the memory's bandwidth and its FLOPs at
the rate of bfloat16 products (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785). Writes
results/rooflines.json and prints Markdown tables, which docs/benchmarks/cuda.md has.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "results" / "rooflines.json"
BANDWIDTH, RATE = 3.0e12, 790e12  # bytes/s of copies and FLOP/s of large bfloat16 products that an H100 SXM reaches
MEMORY, SHARE, RESERVE = 81559 << 20, 0.90, 2.0e9  # bytes of the device, of them used, of them for activations
# Shares of the ceilings that the expected times assume.
PRODUCT_BANDWIDTH, PRODUCT_RATE, KV_BANDWIDTH = 0.90, 0.75, 0.85
ATTENTION_RATE, PROMPT_RATE = 450e12, 600e12  # FLOP/s of prefill attention in Triton, and of a prompt's products
FLASH_RATE = 650e12  # FLOP/s of FlashAttention-3, causal; up to 740 in all: https://arxiv.org/abs/2407.08608
LAUNCHES, LAUNCH, REST = 330, 2.5e-6, 0.15e-3  # of a step in a graph, s each; sampling and the host's copies, s


@dataclass(frozen=True)
class Model:
    """Llama-3.1-8B in bfloat16."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    itemsize: int = 2

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        return self.hidden * (self.qkv + self.heads * self.head_dim + 3 * self.inner)

    @property
    def parameters(self) -> int:
        """Of all products of a step: the layers and the head."""
        return self.layers * self.layer_parameters + self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        return self.itemsize * (self.parameters + self.hidden * self.vocabulary)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the KV cache, all layers."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize * self.layers

    @property
    def cache_tokens(self) -> float:
        return (SHARE * MEMORY - self.weight_bytes - RESERVE) / self.token_bytes


@dataclass(frozen=True)
class Work:
    """What a kernel reads, writes and computes in one launch. launches: in a step."""

    kernel: str
    bytes: float
    flops: float
    launches: int

    @property
    def seconds(self) -> float:
        return max(self.bytes / BANDWIDTH, self.flops / RATE)

    @property
    def bound(self) -> str:
        return "bandwidth" if self.bytes / BANDWIDTH >= self.flops / RATE else "products"


def product(model: Model, name: str, tokens: int, inputs: int, outputs: int, launches: int) -> Work:
    size = model.itemsize * (inputs * outputs + tokens * (inputs + outputs))
    return Work(name, size, 2.0 * tokens * inputs * outputs, launches)


def kernels(model: Model, rows: int, tokens: int, context: int) -> list[Work]:
    """The launches of a step. Args: batch rows; tokens of each; tokens in the cache before, of each."""
    total, item, layers = rows * tokens, model.itemsize, model.layers
    seen = tokens * context + tokens * (tokens + 1) / 2  # pairs of query and key of a row
    width = model.heads * model.head_dim
    kv = model.token_bytes / layers
    attention = rows * (context + tokens) * kv + 2 * total * width * item
    return [
        Work("norm", total * model.hidden * (4 + 4 + 2 * item), 0, 2 * layers + 1),
        product(model, "qkv product", total, model.hidden, model.qkv, layers),
        Work("rotary and write to the cache", total * (2 * width * item + 2 * kv), 0, layers),
        Work("attention", attention, 4.0 * rows * seen * width, layers),
        product(model, "output product", total, width, model.hidden, layers),
        product(model, "gate and up product", total, model.hidden, 2 * model.inner, layers),
        Work("gated activation", total * 3 * model.inner * item, 0, layers),
        product(model, "down product", total, model.inner, model.hidden, layers),
        product(model, "head", rows, model.hidden, model.vocabulary, 1),
        Work("sampling, no filters", rows * model.vocabulary * item, 0, 1),
    ]


def decode_step(model: Model, rows: int, context: float) -> dict[str, float]:
    """Seconds of a decode step: roofline, and expected with the shares above.

    The roofline lets reading weights and computing overlap, the expected time a tenth less.
    """
    weights = model.itemsize * model.parameters / BANDWIDTH
    flops = 2.0 * model.parameters * rows / RATE
    kv = rows * context * model.token_bytes / BANDWIDTH
    reading, computing = weights / PRODUCT_BANDWIDTH, flops / PRODUCT_RATE
    products = max(reading, computing) + 0.1 * min(reading, computing)
    expected = products + kv / KV_BANDWIDTH + LAUNCHES * LAUNCH + REST
    return {"weights": weights, "flops": flops, "kv": kv, "roofline": max(weights, flops) + kv, "expected": expected}


def workloads(model: Model) -> list[dict[str, Any]]:
    """Rates by workload and batch rows: 1 / (output * step / rows + prompt)."""
    rows_of = []
    for prompt, output, batches in ((500, 2000, (64, 256)), (2048, 128, (64,)), (6000, 4000, ())):
        context = prompt + output / 2
        flops = 2.0 * model.layers * model.layer_parameters * prompt
        flops += 2.0 * model.heads * model.head_dim * prompt * prompt * model.layers
        for rows in (*batches, int(model.cache_tokens / context)):
            step = decode_step(model, rows, context)
            rates = {
                f"rate_{kind}": 1 / (output * step[kind] / rows + flops / rate)
                for kind, rate in (("roofline", RATE), ("expected", PROMPT_RATE))
            }
            rows_of.append({"prompt": prompt, "output": output, "rows": rows, "prompt_s": flops / RATE} | step | rates)
    return rows_of


def chunks(model: Model) -> list[dict[str, Any]]:
    """Prefill attention of one layer, beside the products of the layer, in seconds."""
    made = []
    for tokens, context in ((512, 1500), (2048, 0), (2048, 4096), (2048, 30720)):
        attention = next(work for work in kernels(model, 1, tokens, context) if work.kernel == "attention")
        made.append({
            "tokens": tokens, "context": context, "roofline": attention.seconds,
            "triton": attention.flops / ATTENTION_RATE, "flash": attention.flops / FLASH_RATE,
            "products": 2.0 * model.layer_parameters * tokens / PROMPT_RATE,
        })  # fmt: skip
    return made


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def kernel_table(step: Sequence[Work]) -> str:
    rows = [
        (work.kernel, str(work.launches), f"{work.bytes / 1e6:,.1f}", f"{work.flops / 1e9:,.1f}",
         f"{work.seconds * 1e6:,.1f}", work.bound, f"{work.seconds * work.launches * 1e3:,.2f}")
        for work in step
    ]  # fmt: skip
    header = ("kernel", "launches", "MB each", "GFLOP each", "limit each, µs", "bound by", "limit of all, ms")
    return markdown(header, rows)


def main() -> int:
    model = Model()
    print(f"weights {model.weight_bytes / 1e9:.2f} GB, a token {model.token_bytes} bytes in the KV cache, ", end="")
    print(f"which holds {model.cache_tokens / 1e3:.0f}k tokens\n")
    steps = {"decode": (64, 1, 1500), "prefill": (1, 2048, 4096)}
    for name, (rows, tokens, context) in steps.items():
        print(f"{name}: {rows} rows of {tokens} tokens after {context}\n")
        print(kernel_table(kernels(model, rows, tokens, context)))
    rates = workloads(model)
    names = ("weights", "flops", "kv", "roofline", "expected")
    header = ("prompt/output", "rows", *(f"{name}, ms" for name in names), "req/s, roofline", "req/s, expected")
    print(markdown(header, [
        (f"{row['prompt']}/{row['output']}", str(row["rows"]), *(f"{row[name] * 1e3:.2f}" for name in names),
         f"{row['rate_roofline']:.2f}", f"{row['rate_expected']:.2f}")
        for row in rates
    ]))  # fmt: skip
    prefill = chunks(model)
    header = ("chunk", "after", "limit, µs", "Triton, assumed, µs", "FlashAttention-3, µs", "products of the layer, µs")
    print(markdown(header, [
        (str(row["tokens"]), str(row["context"]),
         *(f"{row[name] * 1e6:,.0f}" for name in ("roofline", "triton", "flash", "products")))
        for row in prefill
    ]))  # fmt: skip
    parts = {
        name: [vars(work) | {"seconds": work.seconds} for work in kernels(model, *of)] for name, of in steps.items()
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"kernels": parts, "workloads": rates, "chunks": prefill}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
