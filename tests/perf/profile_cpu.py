"""`make profile-cpu`: how long a step of the fused stack takes against what the machine allows, and where it goes.

For batches of rows that decode at several contexts, and for chunks of a prompt: the median of several runs beside the
limit (see cpu_limits.py), and the time of each op. The machine is measured before and after each of them: it is shared,
and its limits move. A limit takes the mean of the two.

Writes results/profile-cpu.json, rows: form, rows, context, tokens (of each row), step_ms, limit_ms, attention_limit_ms
(with attention's own products), each op's ms, and read_gb_s and gemm_tflop_s, each before and after; and the figure
docs/figures/cpu-roofline.png. MODEL=smollm2-135m, FORMS=bf16,int8 and REPEATS=9 pick others.
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
from tests.perf.cpu_limits import Machine, MachineProbe, Shape, mean_of
from tests.perf.cpu_stack import BLOCK, FORMS, batch_of, folder_of, make

ROOT = Path(__file__).parents[2]
RESULTS, PICTURE = ROOT / "results" / "profile-cpu.json", ROOT / "docs" / "figures" / "cpu-roofline.png"
ROWS, CONTEXTS = (1, 2, 4, 8, 16, 32, 64, 128), (64, 256, 1024)
CHUNKS = ((0, 512), (1536, 512))  # context, tokens
APART = ("step", "limit", "attention_limit")  # what is not an op's time
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
    parts = ", ".join(f"{name} {value:.2f}" for value, name in ops if name not in APART and value >= 0.005)
    speed = 1e3 * row["rows"] * row["tokens"] / row["step_ms"]
    print(
        f"{row['form']:<14} {row['rows']:>4} x {row['tokens']:<4} after {row['context']:>5}: {row['step_ms']:8.2f} ms, "
        f"{speed:7.0f} tok/s, {row['limit_ms'] / row['step_ms']:5.0%} of the limit, with attention's products "
        f"{row['attention_limit_ms'] / row['step_ms']:.0%}; {row['read_gb_s']} GB/s, "
        f"{row['gemm_tflop_s']} TFLOP/s; {parts}",
        flush=True,
    )


def limits(shape: Shape, before: Machine, after: Machine, rows: int, context: int, tokens: int) -> dict[str, Any]:
    """The least times of a point, ms, and what the machine showed before and after it."""
    machine = mean_of(before, after)
    if tokens == 1:
        both = [shape.step_s(machine, rows, context, attention=attention) for attention in (False, True)]
    else:
        products = shape.attention_operations(rows, context, tokens) / (machine.gemm_tflop_s * 1e12)
        both = [shape.prefill_s(machine, rows, tokens) + attention for attention in (0, products)]
    return {
        "limit_ms": round(1e3 * both[0], 3), "attention_limit_ms": round(1e3 * both[1], 3),
        "read_gb_s": [round(one.read_gb_s, 1) for one in (before, after)],
        "gemm_tflop_s": [round(one.gemm_tflop_s, 3) for one in (before, after)],
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], machines: list[Machine], model: str) -> Figure:
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
                f"limit: weights and KV cache at {_range([m.read_gb_s for m in machines], 1)} GB/s, or products at "
                f"{_range([m.gemm_tflop_s for m in machines], 2)} TFLOP/s, measured around each point",
            ],
            5.4,
        )
        return figure


def _range(values: list[float], digits: int) -> str:
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


def main() -> None:
    model = os.environ.get("MODEL", "smollm2-135m")
    names, repeats = os.environ.get("FORMS", "bf16,int8").split(","), int(os.environ.get("REPEATS", "9"))
    folder = folder_of(model)
    shape, probe = Shape.read(folder), MachineProbe(cores())
    rows: list[dict[str, Any]] = []
    machines: list[Machine] = []
    for name in names:
        stack, vocabulary = make(folder, FORMS[name], NUM_BLOCKS)
        machines.append(probe.measure())
        points = [(count, context, 1) for context in CONTEXTS for count in ROWS]
        for count, context, tokens in [*points, *((1, context, tokens) for context, tokens in CHUNKS)]:
            row = measure(stack, vocabulary, count, context, tokens, repeats)
            machines.append(probe.measure())
            rows.append({"form": name, **row, **limits(shape, *machines[-2:], count, context, tokens)})
            show(rows[-1])
        stack.close()
    probe.close()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    if "bf16" in names:
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        for path in save(draw(rows, machines, model), PICTURE):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
