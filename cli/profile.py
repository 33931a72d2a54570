"""`redline profile`: measures this machine; with --tune, tiles of the attention kernels on its GPU."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import GroupedCommand, option, with_options
from cli.screen import verbatim_console

if TYPE_CHECKING:
    from rich.console import Console

    from engine.worker.tile_tuning import Choice

MACHINE, MEASURE, SHAPE = "This machine", "Tiles of attention on a GPU", "Shape of --tune, without a model"
PROFILE_OPTIONS = (
    option(
        MACHINE, "--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto",
        help="Device to measure, as of redline serve.",
    ),
    option(
        MACHINE, "--out", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.yaml",
        default_text="that of sim:this-machine in the user's cache",
        help="Hardware description to write, for --device sim:FILE.yaml.",
    ),
    option(
        MEASURE, "--tune", is_flag=True,
        help="Measure tiles of the attention kernels, and write the fastest into a table that `redline serve` reads.",
    ),
    option(
        MEASURE, "--tile-table", "file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
        default_text="that of the GPU in the user's cache, which serve uses",
        help="Table to write. Tiles for other shapes that are in it are kept.",
    ),
    option(
        MEASURE, "--dtype", type=click.Choice(("bfloat16", "float16", "float32")),
        default_text="the model's, or bfloat16",
        help="Data type of queries, keys and values.",
    ),
    option(
        MEASURE, "--kv-cache-dtype", type=click.Choice(("auto", "int8")), default="auto",
        help="Data type of the KV cache. The tiles for int8 serve all caches in 8 bits.",
    ),
    option(
        MEASURE, "--block-size", type=click.IntRange(1, 1024), metavar="TOKENS", default=32,
        help="Tokens of a KV block, as of redline serve.",
    ),
    option(SHAPE, "--heads", type=click.IntRange(1, 1024), metavar="N", help="Query heads on one GPU."),
    option(SHAPE, "--kv-heads", type=click.IntRange(1, 1024), metavar="N", help="KV heads on one GPU."),
    option(SHAPE, "--head-dim", type=click.IntRange(2, 1024), metavar="N", help="Elements of a head."),
)  # fmt: skip
HEADS = ("heads", "kv_heads", "head_dim")


@click.command(cls=GroupedCommand, context_settings={"max_content_width": 110})
@with_options(*PROFILE_OPTIONS)
@click.argument("model", required=False)
def command(**params: Any) -> None:
    """Measure this machine, so that --device sim:this-machine predicts what it does.

    Steps of small models with random weights are measured by themselves and over HTTP, which takes about four minutes.
    A hardware description is fitted to them: see docs/simulation/profile.md. Leave the machine alone meanwhile.

    With --tune, measure the attention kernels of MODEL on this machine's GPU instead, and choose their tiles. Only the
    shape of MODEL is used, not its weights; --heads, --kv-heads and --head-dim give a shape without a model. About 50
    kernels are compiled; Triton keeps them, so that a second run starts where an interrupted one ended.

    \b
    For example:
      redline profile
      redline profile --out ours.yaml
      redline profile meta-llama/Llama-3.1-8B --tune
      redline profile --tune --heads 32 --kv-heads 8 --head-dim 128

    \b
    Exit codes:
      0  The description or the table is written.
      1  An error ended the measurement.
      2  A flag is wrong, or there is no GPU for it.
    """
    if not params["tune"]:
        _check_machine(params)
        from cli.profile_machine import profile_machine

        return profile_machine(params["device"], params["out"])
    _check(params)
    from engine.devices.cuda import gpu_with_triton
    from engine.devices.tile_files import default_file

    facts = gpu_with_triton()
    return _tune(verbatim_console(file_width=100), params, facts.name, params["file"] or default_file(facts.name))


def _check_machine(params: dict[str, Any]) -> None:
    """Without --tune."""
    if params["model"] is not None:
        raise click.UsageError("the whole machine is measured, without MODEL; --tune measures the attention of MODEL")
    of_tune = [name for name in (*HEADS, "file") if params[name] is not None]
    if of_tune:
        raise click.UsageError(
            f"--{'tile-table' if of_tune[0] == 'file' else of_tune[0].replace('_', '-')} needs --tune"
        )


def _check(params: dict[str, Any]) -> None:
    if params["out"] is not None:
        raise click.UsageError("--out is the file of a hardware description: with --tune use --tile-table")
    given = [name for name in HEADS if params[name] is not None]
    if params["model"] is not None and given:
        raise click.UsageError("give either a model, or --heads, --kv-heads and --head-dim")
    if params["model"] is None and len(given) < len(HEADS):
        raise click.UsageError("give a model, or all of --heads, --kv-heads and --head-dim")
    if params["block_size"] & (params["block_size"] - 1):
        raise click.UsageError(f"--block-size must be a power of two, not {params['block_size']}")
    if params["model"] is None and params["heads"] % params["kv_heads"]:
        raise click.UsageError(f"--heads {params['heads']} is not a multiple of --kv-heads {params['kv_heads']}")


def _tune(console: "Console", params: dict[str, Any], gpu: str, path: Path) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from engine.devices.tile_files import write_table
    from engine.worker.tuning_run import tune_gpu, tuned_shape, tuned_shape_of_model

    dtype, block_size, quantized = params["dtype"], params["block_size"], params["kv_cache_dtype"] == "int8"
    if params["model"] is not None:
        shape = tuned_shape_of_model(params["model"], dtype, block_size, quantized=quantized)
    else:
        heads = params["heads"], params["kv_heads"], params["head_dim"]
        shape = tuned_shape(*heads, dtype or "bfloat16", block_size, quantized=quantized)
    console.print(f"measuring tiles of attention on {gpu}: {shape} …", highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("attention", total=None)

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total)
            bar.console.print(text, style="dim", highlight=False)

        table, choices = tune_gpu(shape, path, show)
    write_table(path, table, gpu=gpu, shape=str(shape), made=f"{datetime.now(UTC):%Y-%m-%d}")
    for launch, choice in choices.items():
        console.print(_table(launch, choice))
    default = (
        "redline serve uses it on this GPU" if params["file"] is None else "use it with redline serve --tile-table"
    )
    console.print(f"tile table: {path} ({default})", highlight=False, soft_wrap=True)


def _table(launch: str, choice: "Choice") -> Any:
    from rich.table import Table

    title = (
        f"{launch}: {choice.tile}" if choice.tile != choice.builtin else f"{launch}: the built-in tile, {choice.tile}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("built-in, µs", justify="right")
    table.add_column("chosen, µs", justify="right")
    for workload, (builtin, chosen) in choice.seconds.items():
        table.add_row(str(workload), f"{builtin * 1e6:.1f}", f"{chosen * 1e6:.1f}")
    return table
