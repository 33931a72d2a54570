"""`redline bench`: sends load to one server and finds the highest request rate that it sustains."""

import math
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from bench.errors import BenchError
from bench.generators import Generators
from bench.measurement.nvml import find_energy
from bench.measurement.progress import ConsoleProgress
from bench.measurement.run import LostServerError, Subject
from bench.measurement.server import HttpServer
from bench.results import FLAG, RunFiles
from bench.results.writing import check_folder
from bench.search.windows import MAX_VIRTUAL_MINUTES, VIRTUAL_WARMUP_LATENCIES, WARMUP_LATENCIES
from bench.target import Target
from bench.target.control import unused_proxy
from bench.target.probe import ServerInfo, probe_server
from bench.target.reported_config import resolved_configuration
from bench.target.server import ServerProcess, has_flag
from bench.workloads import ANY_VOCABULARY, has_exact_lengths, make_workload
from bench.workloads.arrivals import MOST_RATE
from cli.bench_run import make_summary, measure, options_of
from cli.closed import REQUESTS_PER_STREAM, check_closed
from cli.generator_options import GENERATOR_OPTIONS, generators_of
from cli.offline import DEFAULT_REQUESTS, check_offline, run_offline
from cli.options import RESULTS_ROOT, Finite, GroupedCommand, option, with_options
from cli.params import GPUS, LIMIT, RATES, SHARE
from cli.screen import verbatim_console
from cli.simulated import check_simulated, run_simulated
from cli.target_options import TARGET, TARGET_OPTIONS, check_target, target_of
from cli.workload import WORKLOAD_OPTIONS, check_workload, encoder_of, vocabulary_of, workload_spec

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
        default_text=f"15, or {MAX_VIRTUAL_MINUTES:g} with --device",
        help="Time limit of the whole measurement, of virtual time with --device. Raise it if the answer is "
        "provisional, undecided or not confirmed.",
    ),
    option(
        MEASUREMENT, "--window", type=Finite(0, 1e7, min_open=True), metavar="SECONDS",
        default_text="planned from precision, latency and time left",
        help="Length of each measurement window. Raise it if windows are too short to decide.",
    ),
    option(
        MEASUREMENT, "--warmup", type=Finite(0, 1e7), metavar="SECONDS",
        default_text=f"{WARMUP_LATENCIES:g} × latency, {VIRTUAL_WARMUP_LATENCIES:g} × with --device",
        help="Load before each window. Raise it if the batch is not steady by then, as with long outputs.",
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
        TARGET, "--device", metavar="sim:NAME",
        help="Measure --model on simulated hardware, such as sim:h100, in this process and in virtual time, without a "
        "server. Flags behind -- are those of the engine, such as --tp 4.",
    ),
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
@with_options(
    *TARGET_OPTIONS, *TOKENIZER_OPTIONS, *WORKLOAD_OPTIONS, *MEASUREMENT_OPTIONS, *GENERATOR_OPTIONS, *RESULTS_OPTIONS
)  # fmt: skip
@click.argument("serve_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE_FLAGS]")
@click.pass_context
def command(ctx: click.Context, **params: Any) -> None:
    """Find the highest request rate that a server sustains, or measure given rates.

    \b
    Measure a running server:
      redline bench --url http://127.0.0.1:8000 --input 500 --output 200
    Start a Redline server and measure it; flags after -- are for the server:
      redline bench --model smollm2-135m -- --max-num-seqs 16
    Simulate hardware that is not here, in seconds:
      redline bench --device sim:h100 --model Llama-3.1-8B-Instruct

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
    if params["device"] is not None:
        ctx.exit(run_simulated(ctx, console, files, spec, most))
    with generators_of(params, params["seed"], partial(console.print, highlight=False, soft_wrap=True)) as generators:
        ctx.exit(_measure(console, files, params, spec, most, generators))


def _measure(
    console: Console,
    files: RunFiles,
    params: dict[str, Any],
    spec: dict[str, Any],
    most_tokens: int,
    generators: Generators | None,
) -> int:
    """Measure a running server, or start one for the run; returns the exit code.

    Args:
        params: the command's parameters.
        spec: the workload, as in make_workload().
        most_tokens: of its longest request.
        generators: on other hosts, connected.
    """
    if params["model"] is None:
        return _run(console, files, params, spec, probe_server(target_of(params)), generators)
    flags = list(params["serve_flags"])
    if not has_flag(flags, "--max-model-len"):
        flags += ["--max-model-len", str(math.ceil(1.1 * most_tokens))]
    if params["api_key"] and not has_flag(flags, "--api-key"):
        flags += ["--api-key", params["api_key"]]
    server = ServerProcess.redline(params["model"], flags, files.folder / "server.log")
    console.print(f"starting redline serve {params['model']} {' '.join(_without_secrets(flags))} …", highlight=False)
    with server:
        try:
            info = probe_server(target_of(params, server.base_url))
            return _run(console, files, params, spec, info, generators, serve=_without_secrets(flags))
        except LostServerError as error:
            raise (BenchError(f"the server exited: {server.cause()}") if server.ends() else error) from None


def _run(
    console: Console,
    files: RunFiles,
    params: dict[str, Any],
    spec: dict[str, Any],
    info: ServerInfo,
    generators: Generators | None,
    serve: list[str] | None = None,
) -> int:
    """Measure a server over HTTP, print and write; returns the exit code.

    Args:
        params: the command's parameters.
        spec: the workload, as in make_workload().
        info: what the probe found out about the server.
        generators: on other hosts, connected.
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
    if generators is not None:
        generators.check(target)
        console.print(generators.described(), highlight=False, soft_wrap=True)
    options = options_of(params)
    resolved = resolved_configuration(target)
    energy = find_energy(params["energy_gpus"], target, str(resolved.get("device", "")))
    if energy.meter is not None:
        console.print(f"energy: {energy.described}", highlight=False)
    name = params["configuration"]
    described = _described(params, info.kind, target, serve)
    described |= {"energy": energy.described, "resolved": {workload.name: resolved}}
    described |= {"generators": generators.names} if generators is not None else {}
    summary = make_summary(name, described, target.model, workload, options)
    server = HttpServer(target, generators)
    subject = Subject(server, workload, name, options, files, ConsoleProgress(console), energy.meter)
    return measure(console, subject, summary, params, target.model)


def _described(params: dict[str, Any], kind: str, target: Target, serve: list[str] | None) -> dict[str, Any]:
    described: dict[str, Any] = {"model": target.model, "server": kind}
    described |= {"url": target.base_url} if serve is None else {"serve": [params["model"], *serve]}
    return described | ({"requests": target.described()} if target.described() else {})


def _check(ctx: click.Context, params: dict[str, Any]) -> None:
    if params["rate"] is not None and params["rates"] is not None:
        raise click.UsageError("use --rate or --rates, not both")
    check_simulated(ctx)
    check_offline(ctx, params)
    if params["offline"] is None:
        check_target(ctx, params)
        check_closed(params)
    check_workload(ctx)


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
