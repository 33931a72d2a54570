"""`redline serve`: an OpenAI-compatible server for one model."""

import signal
from types import FrameType
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cli.options import SIZE, GroupedCommand, GroupedOption
from engine.config import DEVICES, DTYPES, LOAD_FORMATS, EngineConfig

FILE_WIDTH = 200

SERVER, MODEL, MEMORY, ARTICLES = "Server", "Model", "Memory and scheduling", "Taken from vLLM's commands"


def option(group: str, *names: str, **settings: Any) -> Any:
    return click.option(*names, cls=GroupedOption, group=group, **settings)


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@option(SERVER, "--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@option(SERVER, "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@option(SERVER, "--served-model-name", help="Name of the model for clients [default: as given].")
@option(SERVER, "--api-key", help="Key that clients must send as a bearer token.")
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
    "-tp",
    "--tp",
    "--tensor-parallel-size",
    "tensor_parallel_size",
    default=1,
    show_default=True,
    type=int,
    help="Ranks that share the model.",
)
@option(MODEL, "--seed", default=0, show_default=True, type=int, help="Of sampling, where a request gives none.")
@option(MEMORY, "--max-num-seqs", type=SIZE, help="Rows: requests that run at the same time.")
@option(MEMORY, "--max-num-batched-tokens", type=SIZE, help="The budget: tokens of one step.")
@option(MEMORY, "--block-size", type=int, help="Tokens of one block of KV cache, a power of two.")
@option(MEMORY, "--kv-cache-memory-bytes", type=SIZE, help="Size of the KV cache, e.g. 2GiB.")
@option(MEMORY, "--gpu-memory-utilization", type=float, help="Share of the device's memory to use, 0 to 1.")
@option(
    MEMORY,
    "--enable-prefix-caching/--no-enable-prefix-caching",
    default=True,
    show_default=True,
    help="Reuse the KV cache of equal beginnings.",
)
@option(
    ARTICLES,
    "--tokenizer-mode",
    default="auto",
    type=click.Choice(["auto", "slow", "mistral"]),
    help="Accepted; the folder's own tokenizer is used.",
)
@option(ARTICLES, "--limit-mm-per-prompt", metavar="KIND=N", help="Accepted; no model with images is served yet.")
def command(
    model: str | None,
    model_option: str | None,
    host: str,
    port: int,
    api_key: str | None,
    tokenizer_mode: str,
    limit_mm_per_prompt: str | None,
    **settings: Any,
) -> int:
    """Serve MODEL (a short name such as smollm2-135m, a folder, or a hub id) over HTTP."""
    if (model is None) == (model_option is None):
        raise click.UsageError("give one model: its short name, its folder or its hub id")
    config = EngineConfig(model=model or model_option or "", **settings)
    notes = []
    if tokenizer_mode != "auto":
        notes.append(f"--tokenizer-mode {tokenizer_mode} changes nothing: the model folder's own tokenizer is used")
    if limit_mm_per_prompt is not None:
        notes.append("--limit-mm-per-prompt changes nothing: no model with images is served yet")
    return serve(config, host, port, api_key, notes)


def serve(config: EngineConfig, host: str, port: int, api_key: str | None, notes: list[str]) -> int:
    # Only now: `redline serve --help` needs none of it.
    from engine.api.server import ServerRun, bind
    from engine.frontend.start import start_engine

    console = make_console()
    listener = bind(host, port)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where the shell that started us ignores Ctrl-C
        signal.signal(number, interrupt)
    for note in notes:
        console.print(f"note: {note}", markup=False)
    with console.status(f"starting {config.model}") as status:
        engine = start_engine(config, progress=status.update)
    show_start(console, engine)
    return ServerRun(engine, listener, api_key, lambda line: console.print(line, markup=False)).run()


def make_console() -> Console:
    """The terminal; a file or a pipe has no width, and lines in it are cut by nobody."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=FILE_WIDTH)


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def show_start(console: Console, engine: Any) -> None:
    """Print what was resolved: the model, memory by line, what fits, and where the start's time went."""
    ready = engine.ready
    table = Table(title=f"Redline serves {engine.config.name}", title_justify="left", show_header=False, box=None)
    for what, value, flag in [
        ("model path", ready.model_path, ""),
        ("device", ready.device, "--device"),
        ("dtype", ready.dtype, "--dtype"),
        *((line.what, human_bytes(line.bytes), line.flag) for line in ready.memory),
        ("KV blocks", f"{ready.num_blocks:,} of {ready.block_size} tokens", "--block-size"),
        ("max-model-len", f"{ready.max_model_len:,} tokens", "--max-model-len"),
        ("sequences of that length", f"{fitting_sequences(ready)} at once", "--kv-cache-memory-bytes, --max-num-seqs"),
        (
            "rows, budget",
            f"{ready.max_num_seqs:,} requests, {ready.max_num_batched_tokens:,} tokens a step",
            "--max-num-seqs, --max-num-batched-tokens",
        ),
        ("prefix caching", "on" if ready.prefix_caching else "off", "--no-enable-prefix-caching"),
        ("start", ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in ready.seconds), ""),
    ]:
        table.add_row(what, value, f"[dim]{flag}[/dim]")
    console.print(table)
    for warning in engine.warnings:
        console.print(f"warning: {warning}", markup=False)


def fitting_sequences(ready: Any) -> int:
    """How many sequences of max-model-len the KV cache and the rows hold."""
    blocks = -(-ready.max_model_len // ready.block_size)
    return min(ready.num_blocks // blocks, ready.max_num_seqs)


def human_bytes(count: int) -> str:
    value, unit = float(count), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    while value >= 1024 and unit < len(units) - 1:
        value /= 1024
        unit += 1
    return f"{value:.0f} {units[unit]}" if unit == 0 else f"{value:.1f} {units[unit]}"
