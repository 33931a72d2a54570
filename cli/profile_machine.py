"""`redline profile` without --tune: measures this machine and writes a hardware description."""

import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.screen import verbatim_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from engine.hardware.description import Hardware
    from engine.hardware.host_fit import MeasuredLoad
    from engine.profiling import Grid, MeasuredDevice

HOST_ROUNDS = {"v1": 3, "v0": 2}
RATES = (0.1, 0.5, 0.9, 1.8)  # of loads, in terms of the rate that a few decoding requests alone would take
START_LIMIT_S = 300.0
NAME = "profile"  # under which the model is served


def profile_machine(device: str, out: Path | None) -> None:
    """Measure, write and print.

    Args:
        device: auto, cpu or cuda.
        out: the file to write; None: that of this machine in the user's cache.
    """
    from engine.hardware.description import THIS_MACHINE, Profiled, profile_file
    from engine.hardware.host_fit import fit_host
    from engine.hardware.profile_file import describe, write_description
    from engine.hardware.profiled import profile_warnings
    from engine.host import cores, processor
    from engine.worker.threads import limit_libraries

    limit_libraries()  # before torch is imported
    from engine.profiling import OtherLoad, find_device

    console = verbatim_console(file_width=100)
    found = find_device(device)
    grid, kind = found.grid, found.kind
    path = out or profile_file()
    _check_writable(path)
    console.print(f"measuring {found.title}: leave the machine alone meanwhile …")
    load = OtherLoad()
    with _bar(console) as bar:
        measured = _measure_device(bar, grid, kind)
        loads = {engine: _measure_loads(bar, grid, measured, kind, engine) for engine in HOST_ROUNDS}
    busy = load.share()  # the servers and load generators have ended, so that they count as own
    facts = Profiled(
        processor(), cores(), measured.kernels, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        metadata.version("redline-llm"), round(busy, 4), found.kind,
    )  # fmt: skip
    hardware = describe(measured.fit, facts, measured.defaults, title=found.title, memory_bytes=found.memory_bytes)
    console.print("fitting the costs of the engines to the loads, half a minute …")
    for engine, one in loads.items():
        hardware = fit_host(hardware, grid.shapes[0], engine, one)
    write_description(path, hardware)
    name = THIS_MACHINE if out is None else str(path)
    _print(console, hardware)
    for warning in profile_warnings(name, hardware):
        console.print(f"warning: {warning}", style="bold yellow", highlight=False, soft_wrap=True)
    console.print(f"description: {path} (use it with --device sim:{name})", highlight=False, soft_wrap=True)


def _check_writable(path: Path) -> None:
    """Before minutes are spent. Raises ConfigError."""
    from engine.errors import ConfigError

    if path.suffix != ".yaml":
        raise ConfigError(f"--out {path}: the name of a description ends in .yaml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror} (--out)") from None


def _bar(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def _measure_device(bar: "Progress", grid: "Grid", kind: str) -> "MeasuredDevice":
    from engine.profiling import measure_device

    task = bar.add_task("steps", total=None)
    return measure_device(
        grid,
        lambda done, total, what: bar.update(task, completed=done, total=total, description=f"steps: {what}"),
        {"device": kind},
    )


def _measure_loads(
    bar: "Progress", grid: "Grid", measured: "MeasuredDevice", kind: str, engine: str
) -> "list[MeasuredLoad]":
    """Latencies of loads on a server with one engine."""
    from bench.measurement.host_costs import INPUT, OUTPUT, measure_loads
    from bench.target import Target
    from bench.target.server import ServerProcess
    from engine.hardware.host_fit import MeasuredLoad
    from engine.hardware.loads import Latencies, TimedRequest
    from engine.profiling import SpeedMeter

    task = bar.add_task(f"engine {engine} over HTTP", total=HOST_ROUNDS[engine])
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.log"
        meter = stack.enter_context(SpeedMeter(grid, measured, {"device": kind}))
        flags = ["--load-format", "dummy", "--device", kind, "--engine", engine, "--served-model-name", NAME]
        flags += ["--no-enable-prefix-caching"]
        server = ServerProcess.redline(str(meter.folder), flags, log, start_limit_s=START_LIMIT_S)
        stack.enter_context(server)
        rates = [share * meter.tokens_per_s / OUTPUT for share in RATES]
        loads = measure_loads(
            Target(server.base_url, NAME), meter.shape.vocab_size, rates, HOST_ROUNDS[engine], meter.speed,
            lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    return [
        MeasuredLoad([TimedRequest(at, INPUT, OUTPUT) for at in one.at], Latencies.of(one.first_token, one.per_token))
        for one in loads
    ]


def _print(console: "Console", hardware: "Hardware") -> None:
    from rich.table import Table

    costs, attention = hardware.host.v1, hardware.attention
    rows: list[tuple[str, Any]] = [
        ("weights read", f"{hardware.bandwidth / 1e9:.1f} GB/s"),
        ("products in bfloat16", f"{hardware.peak_tflops.bf16:.3g} TFLOP/s"),
        ("keys and values read", f"{attention.decode.bf16.memory * hardware.bandwidth / 1e9:.1f} GB/s"),
        ("attention of prompts", f"{attention.prompt * hardware.peak_tflops.bf16:.3g} TFLOP/s"),
        ("engine and front end", f"{costs.step_ms:.2f} ms a step, {costs.request_us[1]:.0f} µs for each request of it"),
        (
            "a new request",
            f"{costs.admitted_ms:.2f} ms of the step that begins it, {costs.request_ms:.1f} ms on its way",
        ),
    ]
    table = Table(
        title=hardware.title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
