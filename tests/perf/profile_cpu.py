"""`make profile-cpu`: how long a step of the fused stack takes against what the machine allows, and where it goes.

For batches of rows that decode at several contexts, and for chunks of a prompt: the median of several runs beside the
limit (see cpu_limits.py), and the time of each op. Writes results/profile-cpu.json, rows: form, rows, context, tokens
(of each row), step_ms, limit_ms, and each op's ms; and the figure docs/figures/cpu-roofline.png.
MODEL=smollm2-135m, FORMS=bf16,int8 and REPEATS=15 pick others.
"""

import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.results.environment import hardware
from engine.host import cores
from engine.kernels.cpu.bindings import Stack
from plots.style import COLORS, MARKERS, STYLE, WIDTH_IN, footnote, headline, plain, save
from tests.perf.cpu_limits import Machine, Shape, measure_machine
from tests.perf.cpu_stack import BLOCK, FORMS, batch_of, folder_of, make

ROOT = Path(__file__).parents[2]
RESULTS, PICTURE = ROOT / "results" / "profile-cpu.json", ROOT / "docs" / "figures" / "cpu-roofline.png"
ROWS, CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128), (64, 256, 1024)
CHUNKS = ((0, 512), (1536, 512))  # context, tokens
NUM_BLOCKS = 128 * (1024 // BLOCK + 1) + 1


def measure(stack: Stack, vocabulary: int, rows: int, context: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Median step time and each op's share of it, ms."""
    luck = np.random.default_rng(1)
    each = -(-(context + tokens) // BLOCK)
    blocks = 1 + luck.permutation(NUM_BLOCKS - 1)[: rows * each].reshape(rows, each)
    batch = batch_of([(luck.integers(0, vocabulary, tokens), context, table) for table in blocks])
    times = []
    for turn in range(repeats + 2):
        if turn == 2:  # what came before warmed the caches, and the pages of the KV cache
            stack.seconds()
        began = time.perf_counter()
        stack.begin(batch)
        stack.run(0, stack.last_part)
        stack.choose(np.zeros(rows, dtype=np.float32), np.zeros(rows))
        times.append(time.perf_counter() - began)
    ops = {f"{op}_ms": round(1e3 * seconds / repeats, 4) for op, seconds in stack.seconds().items()}
    return {"rows": rows, "context": context, "tokens": tokens, "step_ms": round(1e3 * median(times[2:]), 3), **ops}


def show(row: dict[str, Any]) -> None:
    ops = sorted(((v, k.removesuffix("_ms")) for k, v in row.items() if k.endswith("_ms")), reverse=True)
    parts = ", ".join(f"{name} {value:.2f}" for value, name in ops if name not in ("step", "limit") and value >= 0.005)
    speed = 1e3 * row["rows"] * row["tokens"] / row["step_ms"]
    print(
        f"{row['form']:<14} {row['rows']:>4} x {row['tokens']:<4} after {row['context']:>5}: {row['step_ms']:8.2f} ms, "
        f"{speed:7.0f} tok/s, {row['limit_ms'] / row['step_ms']:5.0%} of the limit; {parts}",
        flush=True,
    )


def draw(rows: list[dict[str, Any]], machine: Machine, model: str) -> Figure:
    """Step time against rows, each context beside its limit."""
    rows = [row for row in rows if row["form"] == "bf16" and row["tokens"] == 1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, 5.4))
        axes = figure.add_axes((0.08, 0.2, 0.88, 0.71))
        for i, context in enumerate(CONTEXTS):
            mine = [row for row in rows if row["context"] == context]
            at, color = [row["rows"] for row in mine], COLORS[i]
            axes.plot(
                at, [row["step_ms"] for row in mine], color=color, marker=MARKERS[i], label=f"context {context:,}"
            )
            axes.plot(at, [row["limit_ms"] for row in mine], color=color, linestyle="--", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ROWS, [str(n) for n in ROWS])
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.set_xlabel("rows, one token each")
        axes.set_ylabel("step (ms)")
        axes.legend(loc="upper left", title="measured; dashed: the limit")
        headline(figure, "A decode step on the CPU, against what the machine allows", 5.4)
        footnote(
            figure,
            [
                f"{model}, bf16, {cores()} cores; {hardware()['cpu']}",
                f"limit: weights and KV cache at {machine.read_gb_s:.1f} GB/s, or products at "
                f"{machine.gemm_tflop_s:.2f} TFLOP/s, measured in the same run",
            ],
            5.4,
        )
        return figure


def main() -> None:
    model = os.environ.get("MODEL", "smollm2-135m")
    names, repeats = os.environ.get("FORMS", "bf16,int8").split(","), int(os.environ.get("REPEATS", "15"))
    folder = folder_of(model)
    shape, machine = Shape.read(folder), measure_machine(cores())
    print(f"{machine.read_gb_s:.1f} GB/s read, {machine.gemm_tflop_s:.2f} TFLOP/s in bf16 products")
    rows = []
    for name in names:
        stack, vocabulary = make(folder, FORMS[name], NUM_BLOCKS)
        points = [(count, context, 1) for context in CONTEXTS for count in ROWS]
        for count, context, tokens in [*points, *((1, context, tokens) for context, tokens in CHUNKS)]:
            decode = tokens == 1
            limit = shape.step_s(machine, count, context) if decode else shape.prefill_s(machine, count, tokens)
            row = measure(stack, vocabulary, count, context, tokens, repeats)
            rows.append({"form": name, **row, "limit_ms": round(1e3 * limit, 3)})
            show(rows[-1])
        stack.close()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    if "bf16" in names:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        for path in save(draw(rows, machine, model), PICTURE):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
