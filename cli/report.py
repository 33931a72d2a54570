"""`redline report`: draws figures, tables and the HTML report from result files."""

from pathlib import Path

import click

from cli.options import RESULTS_ROOT, GroupedCommand, option, with_options
from cli.screen import verbatim_console

REPORT_OPTIONS = (
    option(
        "Options", "--out", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
        default_text="the results folder; of several, compare-A-B next to the last one", help="Folder of the report.",
    ),
    option(
        "Options", "--fail-if", "conditions", metavar="CONDITION", multiple=True,
        help="Exit with 1 if CONDITION holds, to fail a build. 'itl_p99>+5%' compares with the first folder, or of one "
        "folder with its first configuration. 'ttft_p99>2s' and 'rate<3.5' are absolute. May be repeated.",
    ),
    option(
        "Options", "--timeline", "timelines", metavar="POINT_ID", multiple=True,
        help="Also draw the timeline of this load point (column point_id of points.csv). May be repeated.",
    ),
    option(
        "Options", "--markdown", "as_markdown", is_flag=True,
        help="Print the comparison as Markdown tables, for example for a pull request.",
    ),
)  # fmt: skip


@click.command(name="report", cls=GroupedCommand)
@click.argument("folders", metavar="[FOLDER]...", nargs=-1, type=click.Path(path_type=Path))
@with_options(*REPORT_OPTIONS)
def command(
    folders: tuple[Path, ...],
    out: Path | None,
    conditions: tuple[str, ...],
    timelines: tuple[str, ...],
    as_markdown: bool,
) -> None:
    """Draw figures, tables and the HTML report from the result files in FOLDER.

    Without FOLDER, the newest folder under results/ is used. Several folders are compared in one report; the first one
    is the baseline.

    \b
    Exit codes:
      0  The report is written, and no condition holds.
      1  A condition of --fail-if holds or cannot be judged, or an error
         occurred.
      2  A flag or a condition is wrong.
    """
    from plots.compare import parse_condition
    from plots.data import ReportError, newest

    try:
        for text in conditions:
            parse_condition(text)
    except ReportError as error:
        raise click.UsageError(str(error)) from error
    try:
        chosen = folders or (newest(RESULTS_ROOT),)
        failed = show_report(chosen, out, conditions, timelines, as_markdown)
    except ReportError as error:
        raise click.ClickException(str(error)) from error
    for line in failed:
        click.echo(f"fail-if: {line}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


def show_report(
    folders: tuple[Path, ...],
    out: Path | None,
    conditions: tuple[str, ...] = (),
    timelines: tuple[str, ...] = (),
    as_markdown: bool = False,
) -> list[str]:
    """Write a report, print its comparison and its path, and return the conditions that hold."""
    from plots.compare import failed_conditions
    from plots.data import ReportError
    from plots.report import write_report
    from plots.tables import ablation_table, answer_lines, markdown, simulated_lines, terminal_table, trouble_lines

    try:
        report = write_report(folders, out, timelines)
    except OSError as error:
        where, cause = error.filename or out or folders[-1], error.strerror or error
        raise ReportError(f"{where}: cannot write the report: {cause} (--out)") from None
    if as_markdown:
        click.echo(markdown(report.results, report.comparisons))
    else:
        console = verbatim_console(highlight=False)
        for line in simulated_lines(report.results):
            console.print(line, style="yellow", soft_wrap=True)
        for ablation in report.ablations:
            console.print(ablation_table(ablation))
        # A comparison has one column per configuration: too narrow for an ablation. The page has both.
        ablated = {a.workload for a in report.ablations} if len(folders) == 1 else set()
        for comparison in report.comparisons:
            if comparison.workload not in ablated:
                console.print(terminal_table(comparison))
        for line in answer_lines(report.results):
            console.print(line, style="bold", soft_wrap=True)
        for line in trouble_lines(report.results):
            console.print(line, style="yellow", soft_wrap=True)
        for what, cause in report.results.failures.items():
            console.print(f"not measured: {what}: {cause}", style="red", soft_wrap=True)
    failed = failed_conditions(report.results, conditions)
    # With --markdown, stdout is meant to be piped into a comment: paths go to stderr.
    for path in report.files:
        if path != report.page:
            click.echo(str(path), err=as_markdown)
    click.echo(f"report: {report.page}", err=as_markdown)
    return failed
