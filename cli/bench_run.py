"""What `redline bench` does with a server under test, over HTTP or simulated: measures it, prints and writes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.console import Console

from bench.errors import BenchError
from bench.measurement.progress import answer_text, points_table
from bench.measurement.run import BenchOptions, InterruptedRunError, LostServerError, Subject, measure_configuration
from bench.results import Answer, RunFiles, Summary
from bench.results.writing import CannotWriteError
from bench.workloads import Workload
from cli.closed import run_closed, save_vllm_of_rate, write_summary
from cli.exit_codes import FAILED, FAILED_REQUESTS, INTERRUPTED, UNDECIDED
from cli.workload import arrivals_of, rates_of


def options_of(params: dict[str, Any]) -> BenchOptions:
    return BenchOptions(
        seed=params["seed"],
        precision=params["precision"],
        max_minutes=params["max_minutes"],
        rates=rates_of(params),
        ladder=params["ladder"],
        window_s=params["window"],
        warmup_s=params["warmup"],
        limits=dict(params["limits"]),
        arrivals=arrivals_of(params),
    )


def make_summary(
    configuration: str, described: dict[str, Any], model: str, workload: Workload, options: BenchOptions
) -> Summary:
    """The summary of a run with one configuration, before anything is measured.

    Args:
        configuration: its name.
        described: what is known of it, as plain data; the options are added.
        model: its name, for the title.
    """
    known = {k: v for k, v in dataclasses.asdict(options).items() if v not in (None, {})}
    return Summary(
        title=f"{workload.name} on {model}",
        seed=options.seed,
        configurations={configuration: described | {"options": known}},
        workloads={workload.name: workload.describe()},
    )


def measure(
    console: Console,
    subject: Subject,
    summary: Summary,
    params: dict[str, Any],
    model: str,
    note: Callable[[], str] = lambda: "",
) -> int:
    """Measure as the flags say, print and write; returns the exit code.

    Args:
        params: the command's parameters.
        model: its name in the format of `vllm bench serve`.
        note: called at the end, for a line about the run.
    """
    files, name = subject.files, subject.configuration
    files.write_summary(summary)
    if params["concurrency"] is not None:
        return run_closed(console, subject, summary, params, model, note)
    code, answer, ended = 0, None, None
    try:
        answer = measure_configuration(subject)
        code = FAILED if answer is None else UNDECIDED if answer.rate is None and answer.undecided is not None else 0
    except InterruptedRunError as interrupted:
        answer, code = interrupted.answer, INTERRUPTED
    except BenchError as error:
        answer = error.answer if isinstance(error, LostServerError | CannotWriteError) else None
        ended = error
        summary.failures[f"{name} / {subject.workload.name}"] = str(error)
    summary.answers = [answer] if answer is not None else []
    unwritten = write_summary(files, summary)
    if params["save_vllm_json"] is not None:
        unwritten = save_vllm_of_rate(params["save_vllm_json"], files, model) or unwritten
    failed = _print_end(console, files, summary.title + subject.server.of_hardware, answer, note())
    ended = ended or unwritten
    if ended is not None:
        raise ended
    return FAILED_REQUESTS if failed and code == 0 else code


def _print_end(console: Console, files: RunFiles, title: str, answer: Answer | None, note: str) -> bool:
    """Print the load points, their faults, and the answer as the last line; returns whether requests failed."""
    points = files.read_points()
    failed = [p for p in points if p.failures and p.point_id in files.added]
    if any(p.phase != "probe" for p in points):
        console.print()
        console.print(points_table(points, title=title))
        for point in points:
            if not point.valid:
                console.print(
                    f"INVALID at {point.rate:g} req/s: {point.reason}", style="yellow", highlight=False, soft_wrap=True
                )
        for point in points:
            if point.disturbed:
                text = f"disturbed at {point.rate:g} req/s: {point.disturbance}"
                console.print(text, style="yellow", highlight=False, soft_wrap=True)
    for point in failed:
        console.print(
            f"failed at {point.rate:g} req/s: {point.failure_text()}", style="red", highlight=False, soft_wrap=True
        )
    if note:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"results: {files.folder}", highlight=False, soft_wrap=True)
    if answer is None:
        console.print("no load point produced a valid result", style="bold")
        return bool(failed)
    if answer.note:
        console.print(answer.note, highlight=False, soft_wrap=True)
    console.print(answer_text(answer), soft_wrap=True)
    return bool(failed)
