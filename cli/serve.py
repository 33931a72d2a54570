"""`redline serve`: an OpenAI-compatible server for one model."""

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from cli.options import SIZE, GroupedCommand, GroupedOption
from cli.start_table import human_bytes, show_start
from engine.config import (
    DEVICES,
    DTYPES,
    ENGINES,
    KERNELS,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    QUANTIZATIONS,
    REMOVALS,
    ROUTINGS,
    SCHEDULING_POLICIES,
    SPECULATORS,
    STEP_TIMEOUT_S,
    TOKENIZER_MODES,
    EngineConfig,
)

FILE_WIDTH = 200

SERVER, LOG, MODEL, MEMORY = "Server", "Log and watchdog", "Model", "Memory and scheduling"
BASELINE, ARTICLES = "V0 baseline", "Taken from vLLM's commands"


def split_commas(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Values of an option that may be repeated and may hold several with commas between."""
    names = (name.strip().replace("_", "-") for value in values for name in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


def option(group: str, *names: str, **settings: Any) -> Any:
    return click.option(*names, cls=GroupedOption, group=group, **settings)


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@option(SERVER, "--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@option(SERVER, "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@option(SERVER, "--served-model-name", help="Name of the model for clients [default: as given].")
@option(SERVER, "--api-key", help="Key that clients must send as a bearer token.")
@option(
    SERVER,
    "--api-servers",
    default=1,
    show_default=True,
    type=click.IntRange(1, 64),
    help="API processes in front of the one engine.",
)
@option(LOG, "--disable-log-stats", is_flag=True, help="No line of figures every 10 s of traffic.")
@option(
    LOG,
    "--enable-log-requests/--disable-log-requests",
    "log_requests",
    default=True,
    show_default=True,
    help="A line of JSON for each request that ended.",
)
@option(
    LOG,
    "--step-timeout",
    default=STEP_TIMEOUT_S,
    show_default=True,
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="A step that takes longer is named, with all stacks; after as long again the server ends. 0: never.",
)
@option(MODEL, "--model", "model_option", help="The model, instead of the argument.")
@option(MODEL, "--tokenizer", help="Folder of another tokenizer than the model's.")
@option(
    MODEL, "--dtype", default="auto", show_default=True, type=click.Choice(DTYPES), help="Of weights and activations."
)
@option(
    MODEL, "--load-format", default="auto", show_default=True, type=click.Choice(LOAD_FORMATS), help="Of the weights."
)
@option(MODEL, "--num-layers", type=click.IntRange(1), help="With dummy weights: so many layers only.")
@option(MODEL, "--max-model-len", type=SIZE, help="Tokens of one request, e.g. 4096 or 4K [default: the model's].")
@option(MODEL, "--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="What it runs on.")
@option(
    MODEL,
    "--quantization",
    type=click.Choice(QUANTIZATIONS),
    help="Round the weights of the layers to so many bits, and products to int8 [default: as --dtype].",
)
@option(MODEL, "--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), help="Of keys and values [default: as --dtype].")
@option(
    MODEL,
    "--kernels",
    default="auto",
    show_default=True,
    type=click.Choice(KERNELS),
    help="Instructions that the CPU's kernels may use; torch does without them, slowly.",
)
@option(
    MODEL,
    "-tp",
    "--tp",
    "--tensor-parallel-size",
    "tensor_parallel_size",
    default=1,
    show_default=True,
    type=int,
    help="Ranks that share the model.",
)
@option(
    MODEL,
    "-dp",
    "--dp",
    "--data-parallel-size",
    "data_parallel_size",
    default=1,
    show_default=True,
    type=int,
    help="Replicas of the model, which share cores and memory; rows and budget are those of each.",
)
@option(
    MODEL,
    "--routing",
    default="prefix",
    show_default=True,
    type=click.Choice(ROUTINGS),
    help="To which replica: who has less left to compute, counting a prefix in its cache; without that; or any.",
)
@option(
    MODEL,
    "--lora",
    "--lora-modules",
    "lora",
    multiple=True,
    metavar="NAME=PATH",
    help="An adapter, served as the model NAME; may be repeated, and more loaded while serving.",
)
@option(MODEL, "--seed", default=0, show_default=True, type=int, help="Of sampling, where a request gives none.")
@option(MEMORY, "--max-num-seqs", type=SIZE, help="Rows: requests that run at the same time.")
@option(MEMORY, "--max-num-batched-tokens", type=SIZE, help="The budget: tokens of one step.")
@option(MEMORY, "--block-size", type=int, help="Tokens of one block of KV cache, a power of two.")
@option(MEMORY, "--kv-cache-memory-bytes", type=SIZE, help="Size of the KV cache, of all replicas, e.g. 2GiB.")
@option(MEMORY, "--gpu-memory-utilization", type=float, help="Share of the device's memory to use, 0 to 1.")
@option(
    MEMORY,
    "--enable-prefix-caching/--no-enable-prefix-caching",
    default=True,
    show_default=True,
    help="Reuse the KV cache of equal beginnings.",
)
@option(
    MEMORY,
    "--scheduling-policy",
    default="fcfs",
    show_default=True,
    type=click.Choice(SCHEDULING_POLICIES),
    help="Who gets a row first: who came first, or whose request says the lowest priority.",
)
@option(
    MEMORY,
    "--speculative",
    type=click.Choice(SPECULATORS),
    help="Guess tokens from what was said before and keep those the model confirms: the same text, sooner.",
)
@option(
    MEMORY,
    "--num-speculative-tokens",
    default=4,
    show_default=True,
    type=click.IntRange(1),
    help="Guesses a request gets in a step, at most.",
)
@option(
    BASELINE,
    "--engine",
    default="v1",
    show_default=True,
    type=click.Choice(ENGINES),
    help="v0 does without all of what --ablate names.",
)
@option(
    BASELINE,
    "--ablate",
    multiple=True,
    metavar="NAME,…",
    callback=split_commas,
    help=f"Take parts from V1: {', '.join(REMOVALS)}.",
)
@option(BASELINE, "--num-scheduler-steps", type=int, help="With --engine v0: steps for each time the scheduler runs.")
@option(
    BASELINE,
    "--enable-chunked-prefill/--no-enable-chunked-prefill",
    default=None,
    help="With --engine v0: prompts in chunks, beside the decodes.",
)
@option(
    ARTICLES,
    "--tokenizer-mode",
    default="auto",
    show_default=True,
    type=click.Choice(TOKENIZER_MODES),
    help="mistral: a folder's params.json, consolidated.safetensors, tekken.json. auto: where nothing else is there.",
)
@option(ARTICLES, "--limit-mm-per-prompt", metavar="KIND=N", help="Accepted; no model with images is served yet.")
def command(
    model: str | None,
    model_option: str | None,
    host: str,
    port: int,
    api_key: str | None,
    api_servers: int,
    disable_log_stats: bool,
    log_requests: bool,
    step_timeout: float,
    limit_mm_per_prompt: str | None,
    lora: tuple[str, ...],
    **settings: Any,
) -> int:
    """Serve MODEL (a short name such as smollm2-135m, a folder, or a hub id) over HTTP."""
    if (model is None) == (model_option is None):
        raise click.UsageError("give one model: its short name, its folder or its hub id")
    config = EngineConfig(model=model or model_option or "", adapters=split_adapters(lora), **settings)
    notes = []
    if config.tokenizer_mode == "slow":
        notes.append("--tokenizer-mode slow changes nothing: the model folder's own tokenizer is used")
    if limit_mm_per_prompt is not None:
        notes.append("--limit-mm-per-prompt changes nothing: no model with images is served yet")
    return serve(
        config, Serving(host, port, api_key, api_servers, not disable_log_stats, log_requests, step_timeout), notes
    )


def split_adapters(given: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Names and folders of adapters, from NAME=PATH."""
    parts = (one.partition("=") for one in given)
    pairs = tuple((name, str(Path(path).expanduser()) if path else "") for name, _, path in parts)
    wrong = next((one for one, (name, path) in zip(given, pairs, strict=True) if not name or not path), None)
    if wrong is not None:
        raise click.UsageError(f"--lora takes NAME=PATH, not {wrong!r}")
    return pairs


@dataclass(frozen=True, slots=True)
class Serving:
    """What concerns the server, not the engine."""

    host: str
    port: int
    api_key: str | None
    api_servers: int
    log_stats: bool
    log_requests: bool
    step_timeout_s: float


def serve(config: EngineConfig, serving: Serving, notes: list[str]) -> int:
    # Only now: `redline serve --help` needs none of it.
    from engine.api.run import ServeOptions, ServerRun
    from engine.api.server import bind_all
    from engine.frontend.logs import log_to_stderr
    from engine.frontend.start import start_engine

    console = make_console()
    listeners = bind_all(serving.host, serving.port, serving.api_servers)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where the shell that started us ignores Ctrl-C
        signal.signal(number, interrupt)
    log_to_stderr()
    for note in notes:
        console.print(f"note: {note}", markup=False)
    with StartProgress(console, f"starting {config.model}") as progress:
        engine = start_engine(
            config,
            progress=progress.tell,
            loading=progress.load,
            front_ends=serving.api_servers,
            step_timeout_s=serving.step_timeout_s,
        )
    show_start(console, engine)
    options = ServeOptions(serving.api_key, serving.log_stats, serving.log_requests)
    return ServerRun(engine, listeners, options, lambda line: console.print(line, markup=False)).run()


class StartProgress:
    """A line that says what is being done, with a bar once weights are read; gone when the server is up."""

    def __init__(self, console: Console, what: str):
        columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self) -> "StartProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def load(self, done: int, total: int) -> None:
        what = f"reading weights, {human_bytes(done)} of {human_bytes(total)}"
        self._progress.update(self._task, description=what, completed=done, total=total)


def make_console() -> Console:
    """The terminal; a file or a pipe has no width, and lines in it are cut by nobody."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=FILE_WIDTH)


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
