"""`redline serve`: an OpenAI-compatible server for one model."""

import logging
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from types import FrameType
from typing import Any

import click
from msgspec.structs import replace
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from cli.engine_options import ENGINE_OPTIONS
from cli.media_options import MEDIA_OPTIONS, take_media_limits
from cli.mm_options import MM_OPTIONS, apply_cache
from cli.options import SpreadCommand, with_options
from cli.screen import verbatim_console
from cli.serve_options import SERVER_OPTIONS
from cli.serve_values import apply_formats, read_chat_template, read_overrides_of, split_adapters
from cli.start_table import show_start, start_fields
from cli.vllm_options import VLLM_OPTIONS
from cli.vllm_options import notes as vllm_notes
from engine.api.http_options import HttpOptions, Limits
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.log_format import VARIABLE, is_json, log_to_stderr
from engine.phases import Phases, process_start
from engine.signals import EndRequests, EndSignal
from engine.text import human_bytes

FILE_WIDTH = 200
MOST_OPEN_FILES = 1 << 16  # connections, and what else the processes of a server have open; each process has as many

log = logging.getLogger("redline.serve")


class ServeCommand(SpreadCommand):
    in_place_of_argument = "model_option"


@click.command(cls=ServeCommand)
@click.argument("model", required=False)
@with_options(*SERVER_OPTIONS, *ENGINE_OPTIONS, *MEDIA_OPTIONS, *MM_OPTIONS, *VLLM_OPTIONS)
@click.pass_context
def command(
    ctx: click.Context, model: str | None, model_option: str | None, lora: tuple[str, ...], **settings: Any
) -> int:
    """Serve MODEL over an OpenAI-compatible HTTP API.

    MODEL is a short name such as smollm2-135m, a folder, a .gguf file or a hub id. Flags have the names of vLLM's.
    Flags of vllm serve that are not listed here are accepted without effect, or refused with a reason.

    \b
    Values:
      SIZE, TOKENS  4096, 4k (4,000), 4K (4,096), 2GB (2,000,000,000) or
                    2GiB (2,147,483,648)
      ending in …   one or several values; the flag may also be repeated
    """
    if (model is None) == (model_option is None):
        raise click.UsageError("give one model, as the argument or with --model: a short name, a folder or a hub id")
    serving = _serving(settings)
    notes = [*vllm_notes(ctx), *apply_formats(settings)]
    config = _config(model or model_option or "", lora, settings)
    if settings["engine"] is None and config.v0_options:
        notes.append(config.fallback_note())
    if config.tokenizer_mode == "slow":
        notes.append("--tokenizer-mode slow has no effect: the fast tokenizer is used if there is one")
    return serve(config, serving, notes)


def engine_config(model: str, flags: list[str]) -> EngineConfig:
    """The configuration of an engine from the flags of this command; flags of the server have no effect."""
    context = command.make_context("serve", [model, *flags])
    settings = dict(context.params)
    model, lora = settings.pop("model"), settings.pop("lora")
    settings.pop("model_option")
    _serving(settings)
    apply_formats(settings)
    return _config(model, lora, settings)


def _serving(settings: dict[str, Any]) -> "Serving":
    """Take the settings of the server out of all settings."""
    limits = Limits(**_take(settings, Limits.__struct_fields__))
    http = HttpOptions(limits=limits, **_take(settings, HttpOptions.__struct_fields__))
    return Serving(http=http, **_take(settings, [one.name for one in fields(Serving)]))


def _config(model: str, lora: tuple[str, ...], settings: dict[str, Any]) -> EngineConfig:
    settings["hf_overrides"] = read_overrides_of(settings)
    settings["chat_template"] = read_chat_template(settings["chat_template"])
    settings["served_model_name"] = settings["served_model_name"] or None
    settings["media_limits"] = take_media_limits(settings)
    apply_cache(settings)
    return EngineConfig(model=model, adapters=split_adapters(lora), **settings)


def _take(settings: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Remove some settings, and return those that there are."""
    return {name: settings.pop(name) for name in names if name in settings}


@dataclass(frozen=True, slots=True)
class Serving:
    """Settings of the server, without those of the engine; fields have the names of the options."""

    host: str
    port: int
    http: HttpOptions  # with the keys of the command line only
    api_key_file: str | None
    api_servers: int
    shutdown_timeout: float  # seconds
    disable_log_stats: bool
    log_requests: bool
    log_format: str
    otlp_traces_endpoint: str | None
    step_timeout: float  # seconds
    restart_on_failure: int | None


def serve(config: EngineConfig, serving: Serving, notes: list[str]) -> int:
    phases = Phases(process_start())
    # Imported here because `redline serve --help` needs none of it.
    from engine.api.keys import read_keys
    from engine.api.ports import StartingResponder, bind_all
    from engine.api.tls import read_certificate
    from engine.host import allow_open_files
    from engine.start import start_engine

    check_replicas(config)
    keys = read_keys(serving.http.api_keys, serving.api_key_file)
    if serving.http.limits.max_requests_per_key is not None and not keys:
        raise ConfigError("--max-requests-per-key needs API keys: give --api-key or --api-key-file")
    if serving.otlp_traces_endpoint is not None:
        from engine.api.tracing import check_installed

        check_installed()
    http = replace(serving.http, api_keys=keys, media=config.media_options)
    tls = read_certificate(http.ssl_certfile, http.ssl_keyfile)
    console = make_console()
    phases.end("start the command")
    allow_open_files(MOST_OPEN_FILES)
    listeners = bind_all(serving.host, serving.port, serving.api_servers)
    interrupt = interrupt_once()
    for number in (signal.SIGINT, signal.SIGTERM):  # even if the parent shell ignores Ctrl-C
        signal.signal(number, interrupt)
    os.environ[VARIABLE] = serving.log_format  # also of the processes that are started from here on
    log_to_stderr()
    show_line: Callable[[str], None] = log.info if is_json() else console.print
    for note in notes:
        show_line(f"note: {note}")
    with StartingResponder(listeners[0], tls), StartProgress(console, f"starting {config.model}") as progress:
        engine = start_engine(
            config,
            progress=progress.show_phase,
            loading=progress.show_bytes,
            meanwhile=import_server,
            front_ends=serving.api_servers,
            step_timeout_s=serving.step_timeout,
            phases=phases,
        )
    if is_json():
        log.info("serving %s", engine.config.name, extra={"fields": start_fields(engine)})
    else:
        show_start(console, engine)
    from engine.api.server_run import ServeOptions, ServerRun

    options = ServeOptions(
        http,
        not serving.disable_log_stats,
        serving.log_requests,
        serving.otlp_traces_endpoint,
        serving.shutdown_timeout,
        serving.restart_on_failure,
    )
    return ServerRun(engine, listeners, options, show_line, phases).run()


def check_replicas(config: EngineConfig) -> None:
    """Raise ConfigError for more replicas than front ends have counters for."""
    from engine.frontend.front_end_stats import MOST_REPLICAS

    if config.data_parallel_size > MOST_REPLICAS:
        from engine.devices.machine import replica_flags

        given = " ".join(f"{flag} {count}" for flag, count in replica_flags(config).items())
        raise ConfigError(
            f"{given}: a server has at most {MOST_REPLICAS} replicas; start several servers behind a load balancer"
        )


def import_server() -> None:
    """Import the HTTP server, which takes about as long as a core takes to import torch."""
    import engine.api.server_run  # noqa: F401


class StartProgress:
    """Progress line during the start, with a bar while weights are read; removed when the server is up."""

    def __init__(self, console: Console, what: str):
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> "StartProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show_phase(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def show_bytes(self, done: int, total: int) -> None:
        what = f"reading weights, {human_bytes(done)} of {human_bytes(total)}"
        self._progress.update(self._task, description=what, completed=done, total=total)


def make_console() -> Console:
    """A console for the start table; lines are not wrapped if the output is a file or a pipe."""
    return verbatim_console(FILE_WIDTH, highlight=False, soft_wrap=True)


def interrupt_once() -> Callable[[int, FrameType | None], None]:
    """A handler of signals while the server starts; one of the same request does not interrupt the cleaning up."""
    requests = EndRequests()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if requests.add(number):
            raise EndSignal(number)

    return interrupt
