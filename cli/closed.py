"""`redline bench --concurrency N`: measures a closed loop; also writes results in the format of `vllm bench serve`."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.errors import BenchError
from bench.measurement.closed_loop import ClosedPoint, measure_closed_loop
from bench.measurement.machine import MachineReader
from bench.measurement.progress import ConsoleProgress, points_table
from bench.measurement.run import BenchOptions, InterruptedRunError
from bench.results import PointRow, RequestRow, RunFiles, Summary, utc_now
from bench.results.vllm_json import save_vllm_result, vllm_result
from bench.results.writing import CannotWriteError
from bench.search.windows import TimeBudget
from bench.target import Target
from bench.target.metrics import MetricsReader
from bench.workloads import Workload
from cli.exit_codes import FAILED, FAILED_REQUESTS, INTERRUPTED

REQUESTS_PER_STREAM = 4  # without --num-requests


def check_closed(params: dict[str, Any]) -> None:
    """Raise UsageError for flags that contradict each other."""
    concurrency = params["concurrency"]
    if concurrency is not None and any(params[name] is not None for name in ("rate", "rates", "trace")):
        raise click.UsageError("--concurrency cannot be combined with --rate, --rates or --trace")
    if params["num_requests"] is not None and concurrency is None:
        raise click.UsageError("--num-requests needs --concurrency")
    if params["save_vllm_json"] is not None and concurrency is None and params["rate"] is None:
        raise click.UsageError("--save-vllm-json needs --concurrency or --rate (one load point)")


def run_closed(
    console: Console,
    files: RunFiles,
    summary: Summary,
    target: Target,
    workload: Workload,
    options: BenchOptions,
    params: dict[str, Any],
) -> int:
    """Measure, print and write; returns the exit code: FAILED if the load point is invalid."""
    concurrency = int(params["concurrency"])
    count = params["num_requests"] or REQUESTS_PER_STREAM * concurrency
    name = params["configuration"]
    budget = TimeBudget(options.max_minutes * 60)
    reader = MetricsReader(target)
    point = ClosedPoint(
        target, workload, name, reader, options.seed, options.precision, budget.left_s, options.limits,
        stopped=lambda: budget.stopped, machine=MachineReader(target.base_url),
    )  # fmt: skip
    try:
        row, requests = measure_closed_loop(point, files, ConsoleProgress(console), concurrency, count, budget)
    except InterruptedRunError:
        lost = f"; {params['save_vllm_json']} was not written" if params["save_vllm_json"] is not None else ""
        console.print(f"interrupted before the first load point{lost}", style="bold", highlight=False)
        write_summary(files, summary)
        return INTERRUPTED
    except BenchError:
        write_summary(files, summary)
        raise
    failed = CannotWriteError(files.unwritten) if files.unwritten else write_summary(files, summary)
    if params["save_vllm_json"] is not None:
        failed = save_vllm(params["save_vllm_json"], requests, target.model, max_concurrency=concurrency) or failed
    _print(console, files, row)
    if failed is not None:
        raise failed
    if budget.stopped:
        return INTERRUPTED
    if not row.valid:
        return FAILED
    return FAILED_REQUESTS if row.failed else 0


def write_summary(files: RunFiles, summary: Summary) -> CannotWriteError | None:
    """Write the summary; the error is returned, not raised, so that the figures are still printed."""
    summary.finished = utc_now()
    try:
        files.write_summary(summary)
    except CannotWriteError as error:
        return error
    return None


def save_vllm(path: Path, requests: list[RequestRow], model: str, **load: Any) -> CannotWriteError | None:
    """Write the requests in the format of `vllm bench serve --save-result`; returns the error.

    load: request_rate or max_concurrency, as in vllm_result().
    """
    try:
        save_vllm_result(path, vllm_result(requests, model, **load))
    except CannotWriteError as error:
        return error
    return None


def save_vllm_of_rate(path: Path, files: RunFiles, model: str, since: str) -> CannotWriteError | None:
    """The same for the window of the last load point of phase "fixed" that started at or after `since`."""
    points = [p for p in files.read_points() if p.phase == "fixed" and p.started >= since]
    if not points:
        return CannotWriteError(f"{path} was not written: no load point was measured (--save-vllm-json)")
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
    console.print(points_table([row], title=f"{row.workload}, concurrency {row.concurrency}"))
    if row.failures:
        console.print(f"failed: {row.failures}", style="red", highlight=False, soft_wrap=True)
    processes = f", {row.generator_processes} processes" if row.generator_processes > 1 else ""
    console.print(
        f"load generator: {row.generator_us_per_chunk:.1f} µs CPU per chunk{processes}, {row.generator_cpu_share:.0%} "
        f"of a core; P99 read delay {row.loop_lag_p99_ms:.2f} ms, P99 send delay {row.lateness_p99_ms:.2f} ms; "
        f"{row.coalesced_reads} reads contained several chunks",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"results: {files.folder}", highlight=False, soft_wrap=True)
    disturbed = f"; disturbed: {row.disturbance}" if row.disturbed else ""
    if not row.valid:
        console.print(f"INVALID: {row.reason}", style="bold yellow", highlight=False, soft_wrap=True)
        return
    console.print(
        f"concurrency {row.concurrency}: {row.achieved_rate:.4g} req/s, {row.output_tok_s:.0f} tok/s; TTFT P50/P99 "
        f"{row.ttft_p50_ms:.2f}/{row.ttft_p99_ms:.2f} ms, ITL P50/P99 {row.itl_p50_ms:.2f}/{row.itl_p99_ms:.2f} ms"
        f"{disturbed}",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
