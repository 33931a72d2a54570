"""The tables of `make bench-cpu`, from its rows: figures with ratios, and targets beside what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

OFFLINE = ("128/128x64", "500/128x32", "single")
ONLINE = ("online-4", "online-6")
LATENCIES = ("ttft_p50_ms", "itl_p50_ms", "itl_p99_ms")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure of one Redline precision; with `against`, its ratio to the best row of that engine (and precision)."""

    what: str
    precision: str
    workload: str
    key: str
    goal: float
    floor: float | None = None
    against: tuple[str, str] | None = None
    at_most: bool = False


VLLM, LIMIT, Q4_1 = ("vllm", "bfloat16"), ("limit", "bfloat16"), ("llama.cpp", "Q4_1")
OWN = ("redline", "bfloat16")
RATE = "output_tok_s"
TARGETS = (
    Target("128/128x64, × vLLM", "bfloat16", "128/128x64", RATE, 1.5, 1.3, VLLM),
    Target("128/128x64, share of the limit", "bfloat16", "128/128x64", RATE, 0.7, None, LIMIT),
    Target("500/128x32, × vLLM", "bfloat16", "500/128x32", RATE, 1.35, 1.1, VLLM),
    Target("one stream, × vLLM", "bfloat16", "single", RATE, 1.8, 1.5, VLLM),
    Target("one stream, share of the limit", "bfloat16", "single", RATE, 0.9, None, LIMIT),
    Target("int8, 128/128x64, × vLLM bf16", "int8", "128/128x64", RATE, 2.2, 1.6, VLLM),
    Target("int8, one stream, × vLLM bf16", "int8", "single", RATE, 3.0, None, VLLM),
    Target("int4, one stream, × llama.cpp Q4_1", "int4", "single", RATE, 1.2, None, Q4_1),
    Target("int4, 128/128x64, × own bf16", "int4", "128/128x64", RATE, 1.0, None, OWN),
    Target("int4, 500/128x32, × own bf16", "int4", "500/128x32", RATE, 1.0, None, OWN),
    Target("4 req/s, ITL P99, × vLLM", "bfloat16", "online-4", "itl_p99_ms", 0.6, None, VLLM, at_most=True),
    Target("4 req/s, TTFT P50, × vLLM", "bfloat16", "online-4", "ttft_p50_ms", 1.0, None, VLLM, at_most=True),
    Target("4 req/s, output rate, × vLLM", "bfloat16", "online-4", RATE, 1.0, None, VLLM),
    Target("6 req/s, ITL P99, × vLLM", "bfloat16", "online-6", "itl_p99_ms", 0.6, None, VLLM, at_most=True),
    Target("6 req/s, TTFT P50, × vLLM", "bfloat16", "online-6", "ttft_p50_ms", 1.0, None, VLLM, at_most=True),
    Target("6 req/s, output rate, × vLLM", "bfloat16", "online-6", RATE, 1.0, None, VLLM),
    Target("server: first token after, s", "bfloat16", "online-4", "ready_s", 6, None, None, at_most=True),
    Target("server: memory, MB", "bfloat16", "online-4", "memory_mb", 1500, None, None, at_most=True),
    Target("server: idle, % of a core", "bfloat16", "online-4", "idle_cpu_percent", 1, None, None, at_most=True),
)


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right")
    return table


def best(rows: Sequence[Row], workload: str, key: str, engine: str, precision: str | None = None) -> float | None:
    """The best figure of an engine over its modes: the highest rate, or the lowest of anything else."""
    values = [
        row[key]
        for row in rows
        if row["engine"] == engine and row["workload"] == workload and row.get(key) is not None
        if precision is None or row["precision"] == precision
    ]
    choose: Callable[[list[float]], float] = max if key == RATE else min
    return choose(values) if values else None


def ratio(value: float | None, base: float | None, sign: str = "×") -> str:
    """ "1.52×", or "73 %"; nothing where there is nothing to divide by."""
    if value is None or not base:
        return ""
    return f"{value / base:.0%}" if sign == "%" else f"{value / base:.2f}×"


def shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def show(console: Console, rows: list[Row]) -> None:
    machine = next((row for row in rows if row["engine"] == "limit"), None)
    if machine is not None:
        hardware, read, gemm = machine["hardware"], machine["read_gb_s"], machine["gemm_tflop_s"]
        console.print(
            f"{hardware['cpu']}, {hardware['cores']} cores: {read:.1f} GB/s read, {gemm:.2f} TFLOP/s in bf16 products; "
            f"before and after: {shown(machine['read_gb_s_before'])} and {shown(machine['read_gb_s_after'])} GB/s, "
            f"{machine['gemm_tflop_s_before']:.2f} and {machine['gemm_tflop_s_after']:.2f} TFLOP/s"
        )
    if any(row["workload"] in OFFLINE for row in rows):
        console.print(offline_table(rows))
    if any(row["workload"] in ONLINE for row in rows):
        console.print(online_table(rows))
    if any(row["engine"] == "redline" for row in rows):
        console.print(target_table(rows))


def offline_table(rows: list[Row]) -> Table:
    columns = [column for name in OFFLINE for column in (name, "vLLM", "limit")]
    table = new_table("\noutput tok/s, × vLLM's best, share of the limit", "engine", "precision", *columns,
                      "ready s", "first s", "MB", "idle %")  # fmt: skip
    for key in dict.fromkeys((row["engine"], row["precision"], row["mode"]) for row in rows):
        mine = {row["workload"]: row for row in rows if (row["engine"], row["precision"], row["mode"]) == key}
        offline = [mine[name] for name in OFFLINE if name in mine]
        if not offline:
            continue
        cells = []
        for name in OFFLINE:
            value = mine[name][RATE] if name in mine else None
            against = best(rows, name, RATE, *VLLM), best(rows, name, RATE, *LIMIT)
            cells += [shown(value), ratio(value, against[0]), ratio(value, against[1], "%")]
        rest = [offline[0].get(name) for name in ("ready_s", "first_start_s", "memory_mb", "idle_cpu_percent")]
        table.add_row(" ".join(filter(None, (key[0], key[2]))), key[1], *cells, *map(shown, rest))
    return table


def online_table(rows: list[Row]) -> Table:
    columns = [column for name in ("tok/s", "TTFT P50", "ITL P50", "ITL P99") for column in (name, "vLLM")]
    table = new_table("\nover HTTP, ms, × vLLM's best", "engine", "precision", "", *columns, "ready s", "MB", "idle %")
    for workload in ONLINE:
        for row in rows:
            if row["workload"] == workload:
                cells = []
                for key in (RATE, *LATENCIES):
                    cells += [shown(row[key]), ratio(row[key], best(rows, workload, key, *VLLM))]
                name = " ".join(filter(None, (row["engine"], row["mode"])))
                rest = [row.get(key) for key in ("ready_s", "memory_mb", "idle_cpu_percent")]
                table.add_row(name, row["precision"], workload, *cells, *map(shown, rest))
    return table


def target_table(rows: list[Row]) -> Table:
    """What was not measured isn't in it."""
    table = new_table("\ntargets", "Redline", "precision", "floor", "goal", "measured", "")
    for target in TARGETS:
        value = best(rows, target.workload, target.key, "redline", target.precision)
        if value is not None and target.against is not None:
            base = best(rows, target.workload, target.key, *target.against)
            value = value / base if base else None
        if value is None:
            continue
        sign = "≤" if target.at_most else "≥"
        floor = "" if target.floor is None else f"{sign} {target.floor:g}"
        table.add_row(target.what, target.precision, floor, f"{sign} {target.goal:g}", f"{value:,.2f}",
                      verdict(target, value))  # fmt: skip
    return table


def verdict(target: Target, value: float) -> str:
    def reached(line: float) -> bool:
        return value <= line if target.at_most else value >= line

    if reached(target.goal):
        return ""
    return "[red]missed[/red]" if target.floor is None or not reached(target.floor) else "above the floor"
