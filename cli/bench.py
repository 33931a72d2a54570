"""`redline bench`: load one server and find the highest request rate it sustains."""

import dataclasses
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.control import unused_proxy
from bench.errors import BenchError
from bench.facts import resolved_configuration
from bench.files import CannotWriteError, check_folder
from bench.loadgen.probe import ServerFacts, probe_server
from bench.progress import ConsoleProgress, answer_text, failure_words, points_table
from bench.results import FLAG, Answer, RunFiles, Summary
from bench.run import BenchOptions, InterruptedRunError, LostServerError, Subject, measure_configuration
from bench.server import ServerProcess, has_flag
from bench.workloads import make_workload, tells_lengths
from cli.closed import check_closed, run_closed, save_vllm_of_rate, write_summary
from cli.options import Finite
from cli.params import LIMIT, MOST_RATE, RATES, SHARE
from cli.screen import verbatim_console
from cli.target_options import check_target, target_of, target_options
from cli.workload import (
    arrivals_of,
    check_workload,
    encoder_of,
    rates_of,
    vocabulary_of,
    workload_options,
    workload_spec,
)

UNDECIDED = 4  # the exit code where no rate was sustained and windows were too short to tell of at least one
FAILED_REQUESTS = 3  # the exit code of a whole measurement in which requests failed
_ANY_VOCABULARY = 32_000  # where only the lengths of a workload matter


@click.command(context_settings={"max_content_width": 110})
@target_options
@workload_options
@click.option("--rate", type=Finite(0, MOST_RATE, min_open=True), help="Measure this rate only, in requests/s.")
@click.option("--rates", type=RATES, help="Measure these rates: A,B,C.")
@click.option("--concurrency", type=click.IntRange(1, 100_000), help="Instead of a rate: keep this many requests open.")
@click.option("--num-requests", type=click.IntRange(1, 10**7), help="Requests of --concurrency.  [default: 4 x it]")
@click.option(
    "--save-vllm-json",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the result file of `vllm bench serve` (with --concurrency or --rate).",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of arrivals and prompts.")
@click.option("--precision", type=SHARE, default="10%", show_default=True, help="How closely to find the rate.")
@click.option("--max-minutes", type=Finite(0, 1e6, min_open=True), default=15.0, show_default=True, help="Hard limit.")
@click.option(
    "--window", type=Finite(0, 1e7, min_open=True), help="Seconds measured a load point, instead of the plan's."
)
@click.option(
    "--ladder/--no-ladder", default=True, show_default=True, help="After a search, rates of 0.25 … 1.5 x its answer."
)
@click.option(
    "--slo", "limits", type=LIMIT, multiple=True, help="A latency limit such as ttft_p99=2s; may be repeated."
)
@click.option(
    "--tokenizer",
    help="Tokenizer folder, for a server that does not tell the size of its vocabulary or can't tokenize.",
)
@click.option("--vocab-size", type=click.IntRange(2, 2**31 - 1), help="The size itself.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of result files.  [default: results/bench-DATE-TIME]"
)
@click.option(
    "--configuration", default="bench", show_default=True, help="Name of this configuration in tables and figures."
)
@click.argument("serve_flags", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Find the highest request rate a server sustains, or measure given rates.

    Flags after -- go to the server that --model starts: redline bench --model smollm2-135m -- --max-num-seqs 16

    Exits with 0, with 1 if nothing could be judged or the server was lost, with 3 if requests failed, with 4 if no rate
    was shown to be sustained because windows were too short to tell (raise --max-minutes or --window).
    """
    _check(ctx, given)
    console = verbatim_console(file_width=120)
    folder = given["out"] or Path("results") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    files = RunFiles(folder)
    check_folder(folder, FLAG)
    if given["save_vllm_json"] is not None:
        check_folder(given["save_vllm_json"].parent, "--save-vllm-json")
    spec = workload_spec(ctx)
    most = make_workload(spec, _ANY_VOCABULARY).max_tokens  # what is wrong with it shows before a server is asked
    if given["model"] is None:
        ctx.exit(_run(console, files, given, spec, probe_server(target_of(given))))
    flags = list(given["serve_flags"])
    if not has_flag(flags, "--max-model-len"):
        flags += ["--max-model-len", str(math.ceil(1.1 * most))]
    if given["api_key"] and not has_flag(flags, "--api-key"):
        flags += ["--api-key", given["api_key"]]
    server = ServerProcess.redline(given["model"], flags, folder / "server.log")
    console.print(f"starting redline serve {given['model']} {' '.join(_shown(flags))} …", highlight=False)
    with server:
        try:
            facts = probe_server(target_of(given, server.base_url))
            code = _run(console, files, given, spec, facts, serve=_shown(flags))
        except LostServerError as error:
            raise (BenchError(f"the server ended: {server.cause()}") if server.ends() else error) from None
    ctx.exit(code)


def _run(
    console: Console,
    files: RunFiles,
    given: dict[str, Any],
    spec: dict[str, Any],
    facts: ServerFacts,
    serve: list[str] | None = None,
) -> int:
    """Measure, print and write; returns the exit code."""
    target = facts.target
    assert target is not None
    for note in (*facts.notes, unused_proxy(target)):
        if note:
            console.print(note, highlight=False)
    workload = make_workload(spec, vocabulary_of(given, spec, facts), encoder_of(given, spec, target))
    if facts.max_model_len is not None and tells_lengths(workload) and workload.max_tokens > facts.max_model_len:
        raise BenchError(
            f"requests of up to {workload.max_tokens} tokens don't fit into the server's {facts.max_model_len} "
            "(--max-model-len of the server, or --input, --output or max_tokens of the workload)"
        )
    options = _options(given)
    name = given["configuration"]
    described: dict[str, Any] = {"model": target.model, "server": facts.kind}
    described |= {"url": target.base_url} if serve is None else {"serve": [given["model"], *serve]}
    described |= {"requests": target.described()} if target.described() else {}
    described["resolved"] = {workload.name: resolved_configuration(target)}
    asked = {k: v for k, v in dataclasses.asdict(options).items() if v not in (None, {})}
    summary = Summary(
        title=f"{workload.name} on {target.model}",
        seed=options.seed,
        configurations={name: described | {"options": asked}},
        workloads={workload.name: workload.describe()},
    )
    files.write_summary(summary)
    if given["concurrency"] is not None:
        return run_closed(console, files, summary, target, workload, options, given)
    code, answer, ended = 0, None, None
    try:
        answer = measure_configuration(Subject(target, workload, name, options, files, ConsoleProgress(console)))
        code = 1 if answer is None else UNDECIDED if answer.rate is None and answer.undecided is not None else 0
    except InterruptedRunError as interrupted:
        answer, code = interrupted.answer, 130
    except BenchError as error:
        answer = error.answer if isinstance(error, LostServerError | CannotWriteError) else None
        ended = error
        summary.failures[f"{name} / {workload.name}"] = str(error)
    summary.answers = [answer] if answer is not None else []
    unwritten = write_summary(files, summary)
    if given["save_vllm_json"] is not None:
        unwritten = save_vllm_of_rate(given["save_vllm_json"], files, target.model, summary.started) or unwritten
    failed = _print_end(console, files, summary, answer)
    ended = ended or unwritten
    if ended is not None:
        raise ended
    return FAILED_REQUESTS if failed and code == 0 else code


def _print_end(console: Console, files: RunFiles, summary: Summary, answer: Answer | None) -> bool:
    """The points, what went wrong in them, and the answer as the last line; returns whether requests failed."""
    points = files.read_points()
    failed = [p for p in points if p.failures and p.started >= summary.started]
    if any(p.phase != "probe" for p in points):
        console.print()
        console.print(points_table(points, title=summary.title))
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
            f"failed at {point.rate:g} req/s: {failure_words(point)}", style="red", highlight=False, soft_wrap=True
        )
    console.print(f"results: {files.folder}", highlight=False, soft_wrap=True)
    if answer is None:
        console.print("no load point could be judged", style="bold")
        return bool(failed)
    if answer.note:
        console.print(answer.note, highlight=False, soft_wrap=True)
    console.print(answer_text(answer), soft_wrap=True)
    return bool(failed)


def _check(ctx: click.Context, given: dict[str, Any]) -> None:
    if given["rate"] is not None and given["rates"] is not None:
        raise click.UsageError("give either --rate or --rates")
    check_target(ctx, given)
    check_closed(given)
    check_workload(ctx)


def _options(given: dict[str, Any]) -> BenchOptions:
    return BenchOptions(
        seed=given["seed"],
        precision=given["precision"],
        max_minutes=given["max_minutes"],
        rates=rates_of(given),
        ladder=given["ladder"],
        window_s=given["window"],
        limits=dict(given["limits"]),
        arrivals=arrivals_of(given),
    )


def _shown(flags: list[str]) -> list[str]:
    """The flags without secrets: they are printed and written to the summary."""
    shown = list(flags)
    for i, flag in enumerate(shown):
        key = flag.partition("=")[0].replace("_", "-")
        if key == "--api-key":
            shown[i] = f"{key}=***" if "=" in flag else flag
            if "=" not in flag and i + 1 < len(shown):
                shown[i + 1] = "***"
    return shown
