"""`redline bench --concurrency N`: a closed loop, and its result in the schema of `vllm bench serve`."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.closed import ClosedPoint, measure_closed_loop
from bench.errors import BenchError
from bench.files import CannotWriteError
from bench.loadgen import Target
from bench.machine import MachineReader
from bench.metrics import MetricsReader
from bench.plan import TimeBudget
from bench.progress import ConsoleProgress, points_table
from bench.results import PointRow, RequestRow, RunFiles, Summary, utc_now
from bench.run import BenchOptions, InterruptedRunError
from bench.vllm_json import save_vllm_result, vllm_result
from bench.workloads import Workload

FAILED_REQUESTS = 3
INTERRUPTED = 130  # the exit code of Ctrl-C
REQUESTS_A_STREAM = 4  # where --num-requests isn't given


def check_closed(given: dict[str, Any]) -> None:
    """Raise UsageError for flags that contradict each other."""
    concurrency = given["concurrency"]
    if concurrency is not None and any(given[name] is not None for name in ("rate", "rates", "trace")):
        raise click.UsageError("give either --concurrency or arrivals (--rate, --rates, --trace)")
    if given["num_requests"] is not None and concurrency is None:
        raise click.UsageError("--num-requests needs --concurrency")
    if given["save_vllm_json"] is not None and concurrency is None and given["rate"] is None:
        raise click.UsageError("--save-vllm-json holds one run: it needs --concurrency or --rate")


def run_closed(
    console: Console,
    files: RunFiles,
    summary: Summary,
    target: Target,
    workload: Workload,
    options: BenchOptions,
    given: dict[str, Any],
) -> int:
    """Measure, print and write; returns the exit code: 1 if the figures can't be trusted, 3 if requests failed."""
    concurrency = int(given["concurrency"])
    count = given["num_requests"] or REQUESTS_A_STREAM * concurrency
    name = given["configuration"]
    budget = TimeBudget(options.max_minutes * 60)
    reader = MetricsReader(target)
    point = ClosedPoint(
        target, workload, name, reader, options.seed, options.precision, budget.left_s, options.limits,
        stopped=lambda: budget.stopped, machine=MachineReader(target.base_url),
    )  # fmt: skip
    try:
        row, requests = measure_closed_loop(point, files, ConsoleProgress(console), concurrency, count, budget)
    except InterruptedRunError:
        lost = f"; {given['save_vllm_json']} isn't written" if given["save_vllm_json"] is not None else ""
        console.print(f"interrupted before the first load point{lost}", style="bold", highlight=False)
        write_summary(files, summary)
        return INTERRUPTED
    except BenchError:
        write_summary(files, summary)
        raise
    failed = CannotWriteError(files.unwritten) if files.unwritten else write_summary(files, summary)
    if given["save_vllm_json"] is not None:
        asked = {"max_concurrency": concurrency}
        failed = save_vllm(given["save_vllm_json"], requests, target.model, **asked) or failed
    _print(console, files, row)
    if failed is not None:
        raise failed
    if budget.stopped:
        return INTERRUPTED
    if not row.valid:
        return 1
    return FAILED_REQUESTS if row.failed else 0


def write_summary(files: RunFiles, summary: Summary) -> CannotWriteError | None:
    """Write the summary; returns the error, which must not keep the figures from the screen."""
    summary.finished = utc_now()
    try:
        files.write_summary(summary)
    except CannotWriteError as error:
        return error
    return None


def save_vllm(path: Path, requests: list[RequestRow], model: str, **asked: Any) -> CannotWriteError | None:
    """Write the requests in the schema of `vllm bench serve --save-result`; returns the error."""
    try:
        save_vllm_result(path, vllm_result(requests, model, **asked))
    except CannotWriteError as error:
        return error
    return None


def save_vllm_of_rate(path: Path, files: RunFiles, model: str, since: str) -> CannotWriteError | None:
    """The same for the window of the load point with a given rate that was started after `since`, if there is one."""
    points = [p for p in files.read_points() if p.phase == "fixed" and p.started >= since]
    if not points:
        return CannotWriteError(f"{path}: isn't written, as no load point was measured (--save-vllm-json)")
    point = max(points, key=lambda p: p.started)
    rows = [r for r in _request_rows(files, point.point_id) if r.in_window]
    return save_vllm(path, rows, model, request_rate=point.rate)


def _request_rows(files: RunFiles, point_id: str) -> list[RequestRow]:
    names = [f.name for f in dataclasses.fields(RequestRow)]
    table = files.read_requests(point_id)
    found = []
    for record in table[[n for n in names if n in table]].to_dict("records"):
        fields = {str(key): value for key, value in record.items()}
        for key in ("ttft_s", "e2e_s"):
            fields[key] = None if fields[key] is None or math.isnan(fields[key]) else float(fields[key])
        for key in ("chunk_gaps_s", "chunk_tokens"):
            fields[key] = list(map(float if key == "chunk_gaps_s" else int, fields[key]))
        found.append(RequestRow(**fields))
    return found


def _print(console: Console, files: RunFiles, row: PointRow) -> None:
    console.print()
    console.print(points_table([row], title=f"{row.workload}, {row.concurrency} at a time"))
    if row.failures:
        console.print(f"failed: {row.failures}", style="red", highlight=False, soft_wrap=True)
    several = f", {row.generator_processes} processes" if row.generator_processes > 1 else ""
    console.print(
        f"load generator: {row.generator_us_per_chunk:.1f} µs of CPU a chunk{several}, {row.generator_cpu_share:.0%} "
        f"of a core, reads {row.loop_lag_p99_ms:.2f} ms and sends {row.lateness_p99_ms:.2f} ms late (P99), "
        f"{row.coalesced_reads} reads of several chunks",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"results: {files.folder}", highlight=False, soft_wrap=True)
    disturbed = f"; disturbed: {row.disturbance}" if row.disturbed else ""
    if not row.valid:
        console.print(f"INVALID: {row.reason}", style="bold yellow", highlight=False, soft_wrap=True)
        return
    console.print(
        f"{row.concurrency} at a time: {row.achieved_rate:.4g} req/s, {row.output_tok_s:.0f} tok/s; TTFT P50/P99 "
        f"{row.ttft_p50_ms:.2f}/{row.ttft_p99_ms:.2f} ms, ITL P50/P99 {row.itl_p50_ms:.2f}/{row.itl_p99_ms:.2f} ms"
        f"{disturbed}",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
