"""`redline sweep`: measures configurations on workloads, each on a server of its own, and draws the report."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.exit_codes import FAILED, FAILED_REQUESTS
from cli.generator_options import GENERATOR_OPTIONS, generators_of
from cli.options import RESULTS_ROOT, GroupedCommand, option, with_options
from cli.screen import verbatim_console
from engine.config import SIMULATED
from engine.host import cores

if TYPE_CHECKING:
    from rich.console import Console

    from bench.generators import Generators
    from bench.sweeps.sweepfile import SweepPlan, SweepWorkload


SWEEP_OPTIONS = (
    option("Options", "--preset", "preset_name", metavar="NAME", help="Run a preset instead of FILE."),
    option(
        "Options", "--device", metavar="sim:NAME", default_text="as the sweep says",
        help="Run all configurations on simulated hardware, such as sim:h100, in virtual time.",
    ),
    option("Options", "--dry-run", is_flag=True, help="Print the runs and their time limits, and start nothing."),
    option(
        "Options", "--out", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
        default_text="results/NAME", help="Folder of the result files and the report.",
    ),
    option(
        "Options", "--jobs", type=click.IntRange(1, 256), metavar="N", default_text="number of cores",
        help="Number of processes that simulate, one workload each. Only for sweeps that are simulated as a whole.",
    ),
    option(
        "Options", "--fresh", is_flag=True,
        help="Delete the results of an earlier sweep in the folder first. Needed if the sweep file has changed.",
    ),
)  # fmt: skip


@click.command(name="sweep", cls=GroupedCommand)
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@with_options(*SWEEP_OPTIONS, *GENERATOR_OPTIONS)
def command(
    file: Path | None,
    preset_name: str | None,
    device: str | None,
    dry_run: bool,
    out: Path | None,
    jobs: int | None,
    fresh: bool,
    **generator_params: Any,
) -> int:
    """Measure every configuration of FILE on every workload of FILE, and draw the report.

    Each search, ladder and round starts a server of its own, so that no state is carried over. The same command
    continues an interrupted sweep and repeats failed runs; finished load points are kept. Without FILE and --preset,
    the presets are listed.

    \b
    Exit codes:
      0  All runs are measured.
      1  An error ended the sweep, or a run failed.
      2  A flag is wrong.
      3  All runs are measured, but requests failed.
    """
    from bench.results import slug
    from bench.sweeps.sweepfile import presets, read_sweep

    if file is not None and preset_name is not None:
        raise click.UsageError("use FILE or --preset, not both")
    console = verbatim_console(highlight=False)
    if file is None and preset_name is None:
        _list_presets(console)
        return 0
    if file is None:
        known = presets(simulated=device is not None)
        if preset_name not in known:
            raise click.BadParameter(f"{preset_name!r} is not one of {', '.join(known)}", param_hint="--preset")
        file = known[preset_name]
    if device is not None and not device.startswith(SIMULATED):
        raise click.BadParameter(
            f"{device!r} is not simulated hardware such as sim:h100; set other devices in the sweep's serve flags",
            param_hint="--device",
        )
    plan = read_sweep(file, device)
    folder = out or RESULTS_ROOT / (slug(f"{plan.name}-{device.removeprefix(SIMULATED)}") if device else plan.name)
    if dry_run:
        _show_plan(console, plan, folder)
        return 0
    if plan.is_simulated and generator_params["generators"]:
        raise click.UsageError("--generators: all configurations of this sweep are simulated, without a load generator")
    with generators_of(generator_params, plan.seed, partial(console.print, soft_wrap=True)) as generators:
        return _run(console, plan, folder, jobs, fresh, generators)


def _run(
    console: "Console",
    plan: "SweepPlan",
    folder: Path,
    jobs: int | None,
    fresh: bool,
    generators: "Generators | None",
) -> int:
    from bench.measurement.progress import SweepProgress
    from bench.results import RunFiles
    from bench.sweeps.parallel import run_in_processes
    from bench.sweeps.sweep import run_sweep
    from cli.report import show_report
    from cli.simulated import make_engine
    from engine.simulation import without_core_log
    from plots.data import ReportError

    console.print(f"{plan.title}: {_limit(plan)}, results in {folder}")
    if generators is not None:
        console.print(generators.described())
    runs = {w.name: [c.name for c in plan.of_workload(w)] for w in plan.workloads}
    with without_core_log(), SweepProgress(console, [c.name for c in plan.configurations], runs) as progress:
        try:
            if plan.is_simulated:
                summary = run_in_processes(plan, folder, progress, make_engine, jobs or cores(), fresh=fresh)
            else:
                summary = run_sweep(plan, folder, progress, make_engine, generators, fresh=fresh)
        except KeyboardInterrupt:
            console.print("\ninterrupted; run the same command to continue", style="bold")
            raise
        finally:
            console.print()
            console.print(progress.table())
    console.print()
    try:
        show_report((folder,), None)
    except ReportError as error:
        raise click.ClickException(str(error)) from error
    for answer in summary.answers:
        if answer.disturbance:
            click.echo(f"provisional: {answer.configuration} / {answer.workload}: {answer.disturbance}")
    if summary.failures:
        count = len(summary.failures)
        click.echo(f"{count} run{'s' if count > 1 else ''} failed; run the same command to retry", err=True)
        return FAILED
    failed = sum(point.failed_requests() for point in RunFiles(folder).read_points())
    if failed:
        click.echo(f"{failed} request{'s' if failed > 1 else ''} failed; see column `failures` of points.csv", err=True)
    return FAILED_REQUESTS if failed else 0


def _list_presets(console: "Console") -> None:
    from rich.table import Table

    from bench.measurement.progress import duration
    from bench.sweeps.sweepfile import presets, read_sweep

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("Preset", "Time limit", "What it measures"):
        table.add_column(heading)
    for name, path in presets().items():
        plan = read_sweep(path)
        table.add_row(name, duration(60 * plan.max_minutes()), plan.description)
    console.print(table)
    console.print(
        "\nRun one with `redline sweep --preset NAME`, or your own with `redline sweep FILE.yaml`. "
        "`--dry-run` shows the runs."
    )


def _show_plan(console: "Console", plan: "SweepPlan", folder: Path) -> None:
    """Print one block per run; command lines are too long for a table."""
    from bench.measurement.progress import duration

    console.print(plan.title, style="bold")
    number = 0
    for workload in plan.workloads:
        for configuration in plan.of_workload(workload):
            number += 1
            console.print(f"\n{number}. {configuration.name} / {workload.name}", style="bold")
            console.print(f"   {configuration.shown(workload.max_tokens)}", soft_wrap=True)
            options, of_time = workload.options, " of virtual time" if configuration.is_simulated else ""
            minutes = options.max_virtual_minutes if configuration.is_simulated else options.max_minutes
            console.print(f"   {_method(workload)}; at most {duration(60 * minutes)}{of_time}")
    console.print(f"\n{number} runs, {_limit(plan)}")
    console.print(f"results in {folder}")


def _limit(plan: "SweepPlan") -> str:
    """The time limit of a sweep, in words."""
    from bench.measurement.progress import duration

    if plan.is_simulated:
        return "in virtual time"
    return f"at most {duration(60 * plan.max_minutes())} including server starts"


def _method(workload: "SweepWorkload") -> str:
    """How a workload is measured, in words."""
    options = workload.options
    if options.offline:
        return f"{options.offline} requests at once"
    if options.rates:
        rounds = f" in {options.rounds} rounds" if options.rounds > 1 else ""
        return f"{', '.join(f'{rate:g}' for rate in options.rates)} req/s{rounds}"
    ladder = ", then a ladder of rates common to all configurations" if options.ladder else ""
    if isinstance(options.ladder, tuple):
        found = "the rate found" if options.search == "first" else "the lowest rate found"
        ladder = f", then {', '.join(f'{share:g}' for share in options.ladder)} × {found}"
    if ladder and options.rounds > 1:
        ladder += f" in {options.rounds} rounds"
    first = " on the first configuration" if options.search == "first" else ""
    return f"search with {options.precision:.0%} precision{first}{ladder}"
