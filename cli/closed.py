"""`redline bench --concurrency N`: measures a closed loop; also writes results in the format of `vllm bench serve`."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.errors import BenchError
from bench.measurement.closed_loop import ClosedPoint, measure_closed_loop
from bench.measurement.energy import EnergyReader
from bench.measurement.progress import points_table
from bench.measurement.run import InterruptedRunError, Subject
from bench.results import PointRecord, RequestRecord, RunFiles, Summary, utc_now
from bench.results.vllm_json import save_vllm_result, vllm_result
from bench.results.writing import CannotWriteError
from bench.search.windows import TimeBudget
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
    console: Console, subject: Subject, summary: Summary, params: dict[str, Any], model: str, note: Callable[[], str]
) -> int:
    """Measure, print and write; returns the exit code: FAILED if the load point is invalid.

    Args:
        params: the command's parameters.
        model: its name in the format of `vllm bench serve`.
        note: called at the end, for a line about the run.
    """
    concurrency = int(params["concurrency"])
    count = params["num_requests"] or REQUESTS_PER_STREAM * concurrency
    server, options, files = subject.server, subject.options, subject.files
    budget = TimeBudget(options.max_minutes * 60, server.now)
    loop = ClosedPoint(
        server, subject.workload, subject.configuration, server.open_reader(), options.seed, options.precision,
        budget.left_s, options.limits, stopped=lambda: budget.stopped, machine=server.open_machine(),
        energy=EnergyReader(subject.meter),
    )  # fmt: skip
    try:
        point, requests = measure_closed_loop(loop, files, subject.progress, concurrency, count, budget)
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
        failed = save_vllm(params["save_vllm_json"], requests, model, max_concurrency=concurrency) or failed
    _print(console, files, point, subject.server.of_hardware, note())
    if failed is not None:
        raise failed
    if budget.stopped:
        return INTERRUPTED
    if not point.valid:
        return FAILED
    return FAILED_REQUESTS if point.failed else 0


def write_summary(files: RunFiles, summary: Summary) -> CannotWriteError | None:
    """Write the summary; the error is returned, not raised, so that the figures are still printed."""
    summary.finished = utc_now()
    try:
        files.write_summary(summary)
    except CannotWriteError as error:
        return error
    return None


def save_vllm(path: Path, requests: list[RequestRecord], model: str, **load: Any) -> CannotWriteError | None:
    """Write the requests in the format of `vllm bench serve --save-result`; returns the error.

    load: request_rate or max_concurrency, as in vllm_result().
    """
    try:
        save_vllm_result(path, vllm_result(requests, model, **load))
    except CannotWriteError as error:
        return error
    return None


def save_vllm_of_rate(path: Path, files: RunFiles, model: str) -> CannotWriteError | None:
    """The same for the window of the last load point of phase "fixed" that this run measured."""
    points = [p for p in files.read_points() if p.phase == "fixed" and p.point_id in files.added]
    if not points:
        return CannotWriteError(f"{path} was not written: no load point was measured (--save-vllm-json)")
    point = max(points, key=lambda p: p.started)
    records = [r for r in _request_records(files, point.point_id) if r.in_window]
    return save_vllm(path, records, model, request_rate=point.rate)


def _request_records(files: RunFiles, point_id: str) -> list[RequestRecord]:
    names = [f.name for f in dataclasses.fields(RequestRecord)]
    table = files.read_requests(point_id)
    found = []
    for row in table[[n for n in names if n in table]].to_dict("records"):
        fields = {str(key): value for key, value in row.items()}
        for key in ("ttft_s", "e2e_s"):
            fields[key] = None if fields[key] is None or math.isnan(fields[key]) else float(fields[key])
        for key in ("chunk_gaps_s", "chunk_tokens"):
            fields[key] = list(map(float if key == "chunk_gaps_s" else int, fields[key]))
        found.append(RequestRecord(**fields))
    return found


def _print(console: Console, files: RunFiles, point: PointRecord, of_hardware: str, note: str) -> None:
    console.print()
    title = f"{point.workload}, concurrency {point.concurrency}{of_hardware}"
    console.print(points_table([point], title=title))
    if point.failures:
        console.print(f"failed: {point.failures}", style="red", highlight=False, soft_wrap=True)
    if not of_hardware:
        _print_generator(console, point)
    if point.mean_power_w is not None:
        each = point.joules_per_output_token
        per_token = f", {each:.3g} J per output token" if each is not None else ""
        console.print(f"energy: {point.mean_power_w:.0f} W{per_token}", highlight=False, soft_wrap=True)
    if note:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"results: {files.folder}", highlight=False, soft_wrap=True)
    disturbed = f"; disturbed: {point.disturbance}" if point.disturbed else ""
    if not point.valid:
        console.print(f"INVALID: {point.reason}", style="bold yellow", highlight=False, soft_wrap=True)
        return
    console.print(
        f"concurrency {point.concurrency}: {point.achieved_rate:.4g} req/s, {point.output_tok_s:.0f} tok/s; "
        f"TTFT P50/P99 {point.ttft_p50_ms:.2f}/{point.ttft_p99_ms:.2f} ms, "
        f"ITL P50/P99 {point.itl_p50_ms:.2f}/{point.itl_p99_ms:.2f} ms{disturbed}",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )


def _print_generator(console: Console, point: PointRecord) -> None:
    processes = f", {point.generator_processes} processes" if point.generator_processes > 1 else ""
    console.print(
        f"load generator: {point.generator_us_per_chunk:.1f} µs CPU per chunk{processes}, "
        f"{point.generator_cpu_share:.0%} of a core; P99 read delay {point.loop_lag_p99_ms:.2f} ms, "
        f"P99 send delay {point.lateness_p99_ms:.2f} ms; {point.coalesced_reads} reads contained several chunks",
        highlight=False,
        soft_wrap=True,
    )
