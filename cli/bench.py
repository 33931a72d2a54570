"""`redline bench`: sends load to one server and finds the highest request rate that it sustains."""

import dataclasses
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.errors import BenchError
from bench.measurement.nvml import find_energy
from bench.measurement.progress import ConsoleProgress, answer_text, points_table
from bench.measurement.run import BenchOptions, InterruptedRunError, LostServerError, Subject, measure_configuration
from bench.results import FLAG, Answer, RunFiles, Summary
from bench.results.writing import CannotWriteError, check_folder
from bench.target import Target
from bench.target.control import unused_proxy
from bench.target.probe import ServerInfo, probe_server
from bench.target.reported_config import resolved_configuration
from bench.target.server import ServerProcess, has_flag
from bench.workloads import ANY_VOCABULARY, Workload, has_exact_lengths, make_workload
from bench.workloads.arrivals import MOST_RATE
from cli.closed import REQUESTS_PER_STREAM, check_closed, run_closed, save_vllm_of_rate, write_summary
from cli.exit_codes import FAILED, FAILED_REQUESTS, INTERRUPTED, UNDECIDED
from cli.offline import DEFAULT_REQUESTS, check_offline, run_offline
from cli.options import RESULTS_ROOT, Finite, GroupedCommand, option, with_options
from cli.params import GPUS, LIMIT, RATES, SHARE
from cli.screen import verbatim_console
from cli.target_options import TARGET, TARGET_OPTIONS, check_target, target_of
from cli.workload import (
    WORKLOAD_OPTIONS,
    arrivals_of,
    check_workload,
    encoder_of,
    rates_of,
    vocabulary_of,
    workload_spec,
)

MEASUREMENT, RESULTS = "Measurement", "Results"
MEASUREMENT_OPTIONS = (
    option(
        MEASUREMENT, "--rate", type=Finite(0, MOST_RATE, min_open=True), metavar="REQ/S",
        help="Measure this request rate instead of searching.",
    ),
    option(
        MEASUREMENT, "--rates", type=RATES, metavar="REQ/S,…",
        help="Measure these request rates, separated by commas, instead of searching.",
    ),
    option(
        MEASUREMENT, "--concurrency", type=click.IntRange(1, 100_000), metavar="N",
        help="Keep this many requests open (closed loop) instead of searching. The result has latencies and "
        "throughput, and no sustained rate.",
    ),
    option(
        MEASUREMENT, "--num-requests", type=click.IntRange(1, 10**7), metavar="N",
        default_text=f"{REQUESTS_PER_STREAM} × --concurrency, {DEFAULT_REQUESTS} with --offline",
        help="Number of requests to send with --concurrency or --offline.",
    ),
    option(
        MEASUREMENT, "--slo", "limits", type=LIMIT, multiple=True, metavar="METRIC=LIMIT",
        help="Latency limit that a rate must meet to count as sustained, such as ttft_p99=2s or itl_p50=80ms. The "
        "metrics are ttft, itl, tpot and e2e, each with _p50 or _p99. May be repeated.",
    ),
    option(
        MEASUREMENT, "--precision", type=SHARE, metavar="PERCENT", default="10%",
        help="Relative precision of the rate that the search finds. A finer precision needs longer windows.",
    ),
    option(
        MEASUREMENT, "--max-minutes", type=Finite(0, 1e6, min_open=True), metavar="MINUTES", default=15.0,
        help="Time limit of the whole measurement. Raise it if the answer is provisional, undecided or not confirmed.",
    ),
    option(
        MEASUREMENT, "--window", type=Finite(0, 1e7, min_open=True), metavar="SECONDS",
        default_text="planned from precision, latency and time left",
        help="Length of each measurement window. Raise it if windows are too short to decide.",
    ),
    option(
        MEASUREMENT, "--ladder/--no-ladder", default=True,
        help="After the search, also measure 0.25 to 1.5 times the rate found, for the figures. Switch it off to save "
        "time.",
    ),
    option(
        MEASUREMENT, "--energy-gpus", type=GPUS, metavar="all|none|N,…",
        default_text="those of a server on this machine",
        help="GPUs whose energy is measured, by their numbers in nvidia-smi. Set it if the server runs in a container, "
        "or behind a tunnel. Needs the package nvidia-ml-py (the extra gpu).",
    ),
    option(
        MEASUREMENT, "--seed", type=int, metavar="N", default=0,
        help="Seed of arrival times and prompts. Runs with the same seed send the same requests. Choose another seed "
        "if the server has seen the prompts before.",
    ),
)  # fmt: skip
TOKENIZER_OPTIONS = (
    option(
        TARGET, "--offline", metavar="MODEL",
        help="Measure the throughput of the engine without a server: all requests are submitted at once, with prefix "
        "and feature caches on and off. With several values of --repeat, once for each of them.",
    ),
    option(
        TARGET, "--tokenizer", metavar="PATH", default_text="the server's",
        help="Tokenizer of the model: a folder, a tokenizer.json or a hub id. Set it if the server does not report its "
        "vocabulary size or has no /tokenize.",
    ),
    option(
        TARGET, "--vocab-size", type=click.IntRange(2, 2**31 - 1), metavar="N", default_text="as the server reports",
        help="Vocabulary size of the model, for random prompts. Set it if the server does not report it.",
    ),
)  # fmt: skip
RESULTS_OPTIONS = (
    option(
        RESULTS, "--out", type=click.Path(path_type=Path), metavar="FOLDER", default_text="results/bench-DATE-TIME",
        help="Folder of the result files.",
    ),
    option(
        RESULTS, "--configuration", metavar="NAME", default="bench",
        help="Name of the measured configuration in tables and figures.",
    ),
    option(
        RESULTS, "--save-vllm-json", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="Also write the result in the format of `vllm bench serve --save-result`. Needs --concurrency or --rate.",
    ),
)  # fmt: skip


@click.command(cls=GroupedCommand, context_settings={"max_content_width": 110})
@with_options(*TARGET_OPTIONS, *TOKENIZER_OPTIONS, *WORKLOAD_OPTIONS, *MEASUREMENT_OPTIONS, *RESULTS_OPTIONS)
@click.argument("serve_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE_FLAGS]")
@click.pass_context
def command(ctx: click.Context, **params: Any) -> None:
    """Find the highest request rate that a server sustains, or measure given rates.

    \b
    Measure a running server:
      redline bench --url http://127.0.0.1:8000 --input 500 --output 200
    Start a Redline server and measure it; flags after -- are for the server:
      redline bench --model smollm2-135m -- --max-num-seqs 16

    \b
    Exit codes:
      0  The measurement is complete.
      1  An error ended it, or no load point produced a valid result.
      2  A flag is wrong.
      3  The measurement is complete, but requests failed.
      4  Windows were too short to show that any rate is sustained: raise
         --max-minutes or --window.
    """
    _check(ctx, params)
    console = verbatim_console(file_width=120)
    folder = params["out"] or RESULTS_ROOT / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    files = RunFiles(folder)
    check_folder(folder, FLAG)
    if params["save_vllm_json"] is not None:
        check_folder(params["save_vllm_json"].parent, "--save-vllm-json")
    spec = workload_spec(ctx)
    if params["offline"] is not None:
        ctx.exit(run_offline(console, files, params, spec))
    most = make_workload(spec, ANY_VOCABULARY).max_tokens  # reports a wrong workload before a server is contacted
    if params["model"] is None:
        ctx.exit(_run(console, files, params, spec, probe_server(target_of(params))))
    flags = list(params["serve_flags"])
    if not has_flag(flags, "--max-model-len"):
        flags += ["--max-model-len", str(math.ceil(1.1 * most))]
    if params["api_key"] and not has_flag(flags, "--api-key"):
        flags += ["--api-key", params["api_key"]]
    server = ServerProcess.redline(params["model"], flags, folder / "server.log")
    console.print(f"starting redline serve {params['model']} {' '.join(_without_secrets(flags))} …", highlight=False)
    with server:
        try:
            info = probe_server(target_of(params, server.base_url))
            code = _run(console, files, params, spec, info, serve=_without_secrets(flags))
        except LostServerError as error:
            raise (BenchError(f"the server exited: {server.cause()}") if server.ends() else error) from None
    ctx.exit(code)


def _run(
    console: Console,
    files: RunFiles,
    params: dict[str, Any],
    spec: dict[str, Any],
    info: ServerInfo,
    serve: list[str] | None = None,
) -> int:
    """Measure, print and write; returns the exit code.

    Args:
        params: the command's parameters.
        spec: the workload, as in make_workload().
        info: what the probe found out about the server.
        serve: flags of the server if it was started for this run, without secrets.
    """
    target = info.target
    assert target is not None
    for note in (*info.notes, unused_proxy(target)):
        if note:
            console.print(note, highlight=False)
    workload = make_workload(spec, vocabulary_of(params, spec, info), encoder_of(params, spec, target))
    if info.max_model_len is not None and has_exact_lengths(workload) and workload.max_tokens > info.max_model_len:
        raise BenchError(
            f"requests of up to {workload.max_tokens} tokens exceed the server's maximum of {info.max_model_len} "
            "tokens: raise --max-model-len of the server, or lower --input, --output or max_tokens of the workload"
        )
    options = _options(params)
    resolved = resolved_configuration(target)
    energy = find_energy(params["energy_gpus"], target, str(resolved.get("device", "")))
    if energy.meter is not None:
        console.print(f"energy: {energy.described}", highlight=False)
    summary = _summary(params, info.kind, target, workload, options, serve)
    summary.configurations[params["configuration"]] |= {
        "energy": energy.described, "resolved": {workload.name: resolved},
    }  # fmt: skip
    files.write_summary(summary)
    if params["concurrency"] is not None:
        return run_closed(console, files, summary, target, workload, options, params, energy.meter)
    name = params["configuration"]
    code, answer, ended = 0, None, None
    try:
        progress = ConsoleProgress(console)
        answer = measure_configuration(Subject(target, workload, name, options, files, progress, energy.meter))
        code = FAILED if answer is None else UNDECIDED if answer.rate is None and answer.undecided is not None else 0
    except InterruptedRunError as interrupted:
        answer, code = interrupted.answer, INTERRUPTED
    except BenchError as error:
        answer = error.answer if isinstance(error, LostServerError | CannotWriteError) else None
        ended = error
        summary.failures[f"{name} / {workload.name}"] = str(error)
    summary.answers = [answer] if answer is not None else []
    unwritten = write_summary(files, summary)
    if params["save_vllm_json"] is not None:
        unwritten = save_vllm_of_rate(params["save_vllm_json"], files, target.model, summary.started) or unwritten
    failed = _print_end(console, files, summary, answer)
    ended = ended or unwritten
    if ended is not None:
        raise ended
    return FAILED_REQUESTS if failed and code == 0 else code


def _summary(
    params: dict[str, Any],
    kind: str,
    target: Target,
    workload: Workload,
    options: BenchOptions,
    serve: list[str] | None,
) -> Summary:
    described: dict[str, Any] = {"model": target.model, "server": kind}
    described |= {"url": target.base_url} if serve is None else {"serve": [params["model"], *serve]}
    described |= {"requests": target.described()} if target.described() else {}
    described["options"] = {k: v for k, v in dataclasses.asdict(options).items() if v not in (None, {})}
    return Summary(
        title=f"{workload.name} on {target.model}",
        seed=options.seed,
        configurations={params["configuration"]: described},
        workloads={workload.name: workload.describe()},
    )


def _print_end(console: Console, files: RunFiles, summary: Summary, answer: Answer | None) -> bool:
    """Print the load points, their faults, and the answer as the last line; returns whether requests failed."""
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
            f"failed at {point.rate:g} req/s: {point.failure_text()}", style="red", highlight=False, soft_wrap=True
        )
    console.print(f"results: {files.folder}", highlight=False, soft_wrap=True)
    if answer is None:
        console.print("no load point produced a valid result", style="bold")
        return bool(failed)
    if answer.note:
        console.print(answer.note, highlight=False, soft_wrap=True)
    console.print(answer_text(answer), soft_wrap=True)
    return bool(failed)


def _check(ctx: click.Context, params: dict[str, Any]) -> None:
    if params["rate"] is not None and params["rates"] is not None:
        raise click.UsageError("use --rate or --rates, not both")
    check_offline(ctx, params)
    if params["offline"] is None:
        check_target(ctx, params)
        check_closed(params)
    check_workload(ctx)


def _options(params: dict[str, Any]) -> BenchOptions:
    return BenchOptions(
        seed=params["seed"],
        precision=params["precision"],
        max_minutes=params["max_minutes"],
        rates=rates_of(params),
        ladder=params["ladder"],
        window_s=params["window"],
        limits=dict(params["limits"]),
        arrivals=arrivals_of(params),
    )


def _without_secrets(flags: list[str]) -> list[str]:
    """The flags with API keys masked, for the screen and the summary."""
    shown = list(flags)
    for i, flag in enumerate(shown):
        key = flag.partition("=")[0].replace("_", "-")
        if key == "--api-key":
            shown[i] = f"{key}=***" if "=" in flag else flag
            if "=" not in flag and i + 1 < len(shown):
                shown[i + 1] = "***"
    return shown
