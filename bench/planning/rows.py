"""Rows of a plan: what a number of replicas costs and how fast they answer, and what keeps a replica from more load."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.results import FLAG, PointRecord
from bench.results.writing import replace_file, writing

PLAN_FILE, TABLE_FILE = "plan.json", "plan.csv"
DOES_NOT_FIT, NOT_SUPPORTED, FAILED = "does not fit", "not supported", "failed"  # why a candidate serves no load
# Bindings of load points in the words of a plan; of latency limits the metric is named instead.
_BINDINGS = {
    "KV cache": "KV capacity",
    "batch slots": "batch slots",
    "compute": "queue",
    "not reached": "not reached",
    "undecided": "undecided",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of replica and how many of them serve the load; None in `replicas`: none do."""

    hardware: str
    title: str  # of the hardware
    tp: int
    description: str  # version of the description of the hardware
    limited_by: str  # what keeps a replica from a higher rate, or why no load is served
    note: str = ""
    rate_per_replica: float | None = None  # highest rate within the limits, requests/s
    replicas: int | None = None  # --dp
    gpus: int | None = None
    load_per_replica: float | None = None  # requests/s of each replica at the rate to serve
    output_tok_s: float | None = None  # of all replicas at the rate to serve
    total_tok_s: float | None = None  # the same with the tokens of prompts
    ttft_p50_ms: float | None = None  # latencies at the rate to serve
    ttft_p99_ms: float | None = None
    itl_p50_ms: float | None = None
    itl_p99_ms: float | None = None
    tpot_p50_ms: float | None = None
    e2e_p99_ms: float | None = None
    kv_use_max: float | None = None  # 0..1
    dollars_per_hour: float | None = None
    dollars_per_million_output: float | None = None
    dollars_per_million_total: float | None = None  # of prompts and outputs


def limited_by(failed: PointRecord | None, limits: dict[str, float], binding: str) -> str:
    """What keeps a replica from a higher rate, from the load point above its highest one."""
    if failed is not None and failed.binding == "latency limit":
        broken = [column for column, limit in limits.items() if not getattr(failed, column) <= limit]
        return ", ".join(metric_name(column) for column in broken)
    return _BINDINGS.get(binding, binding)


def metric_name(column: str) -> str:
    """ "ttft_p99_ms" -> "TTFT P99"."""
    metric, percentile, _ = column.split("_")
    return f"{metric.upper()} {percentile.upper()}"


def with_price(row: Row, price: float | None) -> Row:
    """The row with its costs.

    Args:
        price: US dollars for an hour of one GPU; None: not known.
    """
    if price is None or row.gpus is None or not row.output_tok_s or not row.total_tok_s:
        return replace(row, dollars_per_hour=None, dollars_per_million_output=None, dollars_per_million_total=None)
    hourly = row.gpus * price
    return replace(
        row,
        dollars_per_hour=hourly,
        dollars_per_million_output=hourly / 3600 / row.output_tok_s * 1e6,
        dollars_per_million_total=hourly / 3600 / row.total_tok_s * 1e6,
    )


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The cheapest first; without prices the one with the fewest GPUs; those that can't serve the load at the end."""

    def key(row: Row) -> tuple[bool, float, float, float, str, int]:
        cost = math.inf if row.dollars_per_hour is None else row.dollars_per_hour
        spare = -(row.rate_per_replica or 0.0) * (row.replicas or 0)
        return row.replicas is None, cost, row.gpus or 0, spare, row.hardware, row.tp

    return sorted(rows, key=key)


def write_plan(
    folder: Path, digest: str, request: dict[str, Any], hardware: dict[str, dict[str, Any]], rows: Sequence[Row]
) -> None:
    """Write plan.json and plan.csv. Raises CannotWriteError.

    Args:
        digest: of the request, see `PlanRequest.digest`.
        request: as plain data.
        hardware: the marks of simulated hardware, with the errors of its latencies, by name.
        rows: in any order.
    """
    data = {"digest": digest, "simulated": True, "request": request, "hardware": dict(sorted(hardware.items()))}
    data["rows"] = [asdict(row) for row in ordered(rows)]
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with writing(folder / PLAN_FILE, FLAG):
        replace_file(folder / PLAN_FILE, lambda part: part.write_text(text, encoding="utf-8"))
    names = [field.name for field in fields(Row)]

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in ordered(rows):
                writer.writerow([_cell(getattr(row, name)) for name in names])

    with writing(folder / TABLE_FILE, FLAG):
        replace_file(folder / TABLE_FILE, write)


def read_plan(folder: Path, digest: str) -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """The rows of an interrupted plan, and the marks of their hardware; none if there is no plan.

    Raises BenchError if it is another plan.
    """
    path = folder / PLAN_FILE
    if not path.exists():
        return [], {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["digest"] != digest:
            raise BenchError(f"{folder} contains another plan: choose another folder with --out, or delete it")
        return [Row(**row) for row in data["rows"]], data["hardware"]
    except (ValueError, TypeError, KeyError) as error:
        raise BenchError(f"{path} cannot be read ({error}): choose another folder with --out") from None


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
