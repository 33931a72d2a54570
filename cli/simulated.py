"""`redline bench --device sim:NAME`: the engine on simulated hardware, in this process and in virtual time."""

import math
import time
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console

from bench.errors import BenchError
from bench.measurement.progress import ConsoleProgress, duration
from bench.measurement.run import Subject
from bench.results import RunFiles
from bench.search.windows import MAX_VIRTUAL_MINUTES
from bench.target.probe import ServerInfo
from bench.target.server import has_flag
from bench.workloads import Encode, has_exact_lengths, make_workload, needs_vocabulary
from bench.workloads.encoding import local_encoder, local_tokenizer
from cli.bench_run import make_summary, measure, options_of
from cli.workload import vocabulary_of
from engine.config import SIMULATED
from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.simulation import SimulatedEngine

# Parameters about servers over HTTP or about this machine, and their flags.
_NOT_SIMULATED = {
    "url": "--url", "served_model": "--served-model", "api_key": "--api-key", "ca": "--ca", "insecure": "--insecure",
    "headers": "--header", "extra_body": "--extra-body", "ignore_eos": "--ignore-eos",
    "stream_options": "--stream-options", "offline": "--offline", "energy_gpus": "--energy-gpus",
    "generators": "--generators",
}  # fmt: skip


def check_simulated(ctx: click.Context) -> None:
    """Raise UsageError for flags that mean nothing with --device."""
    params = ctx.params
    if params["device"] is None:
        return
    if not params["device"].startswith(SIMULATED):
        raise click.UsageError(
            f"--device {params['device']}: only simulated hardware runs within this command, such as sim:h100; for a "
            "server that it starts put the flag behind --"
        )
    for name, flag in _NOT_SIMULATED.items():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{flag} has no meaning with --device {params['device']}: leave it out")
    if params["model"] is None:
        raise click.UsageError(f"--device {params['device']} needs --model")
    if has_flag(params["serve_flags"], "--device"):
        raise click.UsageError("give --device once, before --")


def run_simulated(ctx: click.Context, console: Console, files: RunFiles, spec: dict[str, Any], most_tokens: int) -> int:
    """Measure, print and write; returns the exit code.

    Args:
        spec: the workload, as in make_workload().
        most_tokens: of its longest request.
    """
    # Imported here because no other run of `redline bench` needs the engine.
    from bench.simulation import SimulatedServer
    from cli.serve import engine_config
    from engine.simulation import simulate, without_core_log

    params = ctx.params
    if ctx.get_parameter_source("max_minutes") is not ParameterSource.COMMANDLINE:
        params["max_minutes"] = MAX_VIRTUAL_MINUTES
    flags = [*params["serve_flags"]]
    if not has_flag(flags, "--max-model-len"):
        flags += ["--max-model-len", str(math.ceil(1.1 * most_tokens))]
    began = time.monotonic()
    simulated = simulate(engine_config(params["model"], [*flags, "--device", params["device"]]))
    for warning in simulated.warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    console.print(simulated.described, highlight=False, soft_wrap=True)
    length = simulated.simulation.config.max_model_len
    info = ServerInfo(simulated.model, length, simulated.vocab_size, "redline")
    workload = make_workload(spec, vocabulary_of(params, spec, info), _encoder(params, spec))
    if has_exact_lengths(workload) and workload.max_tokens > length:
        raise BenchError(
            f"requests of up to {workload.max_tokens} tokens exceed --max-model-len {length}: raise it behind --, or "
            "lower --input, --output or max_tokens of the workload"
        )
    options = options_of(params)
    described = {"model": params["model"], "server": "redline", "serve": [params["model"], *flags]}
    described |= {"simulated": simulated.mark, "resolved": {workload.name: simulated.resolved}}
    summary = make_summary(params["configuration"], described, simulated.model, workload, options)
    server = SimulatedServer(simulated.simulation, simulated.title)
    progress = ConsoleProgress(console)
    subject = Subject(server, workload, params["configuration"], options, files, progress)

    def note() -> str:
        took = f"simulated {duration(server.now())} in {duration(time.monotonic() - began)}"
        return f"{took}\n{server.note}" if server.note else took

    with without_core_log():
        return measure(console, subject, summary, params, simulated.model, note)


def make_engine(model: str, flags: list[str]) -> "SimulatedEngine":
    """The engine that flags of `redline serve` describe; they have a simulated device. Raises ConfigError."""
    from engine.simulation import simulate

    return simulate(parse_flags(model, flags))


def parse_flags(model: str, flags: list[str]) -> "EngineConfig":
    """The configuration that flags of `redline serve` describe. Raises ConfigError, also for flags that don't exist."""
    from cli.serve import engine_config

    try:
        return engine_config(model, flags)
    except click.ClickException as error:  # has the context of a command, which can't be sent to another process
        raise ConfigError(error.format_message().rstrip(".")) from None


def _encoder(params: dict[str, Any], spec: dict[str, Any]) -> Encode | None:
    if needs_vocabulary(spec) or params["tokenizer"] is None:
        return None
    return local_encoder(local_tokenizer(params["tokenizer"]))
