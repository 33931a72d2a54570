"""`redline sweep`: measures configurations on workloads, each on its own server, and draws the report."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.screen import verbatim_console

if TYPE_CHECKING:
    from rich.console import Console

    from bench.sweepfile import SweepPlan, SweepWorkload

ROOT = Path("results")
FAILED_REQUESTS = 3  # the exit code of a whole sweep in which requests failed


@click.command(name="sweep", context_settings={"max_content_width": 110})
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--preset", "preset_name", metavar="NAME", help="A sweep that ships with the product instead of FILE.")
@click.option("--dry-run", is_flag=True, help="Print the runs and the time they take, and start nothing.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the results.  [default: results/NAME]"
)
@click.option("--fresh", is_flag=True, help="Discard what the folder holds of an earlier sweep.")
def command(file: Path | None, preset_name: str | None, dry_run: bool, out: Path | None, fresh: bool) -> int:
    """Measure every configuration of FILE on every workload, each on a server of its own, and draw the report.

    A sweep that was interrupted goes on with the same command; finished points are kept. Without FILE or --preset
    the presets are listed.
    """
    from bench.sweepfile import presets, read_sweep

    if file is not None and preset_name is not None:
        raise click.UsageError("give either FILE or --preset")
    console = verbatim_console(highlight=False)
    if file is None and preset_name is None:
        _list_presets(console)
        return 0
    if file is None:
        known = presets()
        if preset_name not in known:
            raise click.BadParameter(f"{preset_name!r} is not one of {', '.join(known)}", param_hint="--preset")
        file = known[preset_name]
    plan = read_sweep(file)
    folder = out or ROOT / plan.name
    if dry_run:
        _show_plan(console, plan, folder)
        return 0
    return _run(console, plan, folder, fresh)


def _run(console: "Console", plan: "SweepPlan", folder: Path, fresh: bool) -> int:
    from bench.progress import SweepProgress, failed_requests
    from bench.results import RunFiles
    from bench.sweep import run_sweep
    from cli.report import show_report
    from plots.data import ReportError

    console.print(f"{plan.title}: at most {minutes(plan.most_minutes())}, results in {folder}")
    names = [c.name for c in plan.configurations], [w.name for w in plan.workloads]
    with SweepProgress(console, *names) as progress:
        try:
            summary = run_sweep(plan, folder, progress, fresh=fresh)
        except KeyboardInterrupt:
            console.print("\ninterrupted; the same command goes on from here", style="bold")
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
        click.echo(f"{len(summary.failures)} of the runs failed; the same command tries them again", err=True)
        return 1
    failed = sum(failed_requests(point) for point in RunFiles(folder).read_points())
    if failed:
        click.echo(f"{failed} requests failed: points.csv counts them by kind", err=True)
    return FAILED_REQUESTS if failed else 0


def _list_presets(console: "Console") -> None:
    from rich.table import Table

    from bench.sweepfile import presets, read_sweep

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("Preset", "Takes at most", "What it measures"):
        table.add_column(heading)
    for name, path in presets().items():
        plan = read_sweep(path)
        table.add_row(name, minutes(plan.most_minutes()), plan.description)
    console.print(table)
    console.print("\nredline sweep --preset NAME runs one, and --dry-run shows its runs; a file of your own: FILE.yaml")


def _show_plan(console: "Console", plan: "SweepPlan", folder: Path) -> None:
    """One block a run, since command lines are long."""
    console.print(plan.title, style="bold")
    number = 0
    for workload in plan.workloads:
        for configuration in plan.configurations:
            number += 1
            console.print(f"\n{number}. {configuration.name} / {workload.name}", style="bold")
            console.print(f"   {configuration.shown(workload.max_tokens)}", soft_wrap=True)
            console.print(f"   {_how(workload)}; at most {minutes(workload.options.max_minutes)}")
    console.print(f"\n{number} runs, at most {minutes(plan.most_minutes())} with starting the servers")
    console.print(f"results in {folder}")


def _how(workload: "SweepWorkload") -> str:
    options = workload.options
    if options.rates:
        rounds = f" in {options.rounds} rounds" if options.rounds > 1 else ""
        return f"{', '.join(f'{rate:g}' for rate in options.rates)} req/s{rounds}"
    ladder = ", then the ladder that all configurations share" if options.ladder else ""
    if isinstance(options.ladder, tuple):
        found = "the rate found" if options.search == "first" else "the lowest rate found"
        ladder = f", then {', '.join(f'{share:g}' for share in options.ladder)} × {found}"
    if ladder and options.rounds > 1:
        ladder += f" in {options.rounds} rounds"
    first = " on the first configuration" if options.search == "first" else ""
    return f"search to {options.precision:.0%}{first}{ladder}"


def minutes(value: float) -> str:
    """Minutes in words: 45 s, 8 min, 3 h 20 min."""
    if value < 1:
        return f"{60 * value:.0f} s"
    whole = round(value)
    return f"{whole} min" if whole < 100 else f"{whole // 60} h {whole % 60:02d} min"
