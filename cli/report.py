"""`redline report`: redraws figures, tables and the HTML page from result files."""

from pathlib import Path

import click

from cli.screen import verbatim_console

DEFAULT_ROOT = "results"


@click.command(name="report", short_help="Redraw figures and tables from result files.")
@click.argument("folders", metavar="[DIR]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to.  [default: DIR, or compare-A-B beside the last of several]",
)
@click.option(
    "--fail-if",
    "conditions",
    metavar="CONDITION",
    multiple=True,
    help="Exit with 1 where this holds: 'itl_p99>+5%' compares with the first DIR (or configuration), "
    "'ttft_p99>2s' and 'rate<3.5' don't. May be repeated.",
)
@click.option(
    "--timeline",
    "timelines",
    metavar="POINT_ID",
    multiple=True,
    help="Draw this load point (of points.csv) second by second too. May be repeated.",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the comparison as markdown, for a pull request.")
def command(
    folders: tuple[Path, ...],
    out: Path | None,
    conditions: tuple[str, ...],
    timelines: tuple[str, ...],
    as_markdown: bool,
) -> None:
    """Redraw figures, tables and the HTML page from the result files in DIR.

    Without DIR the newest folder under results/ is taken; several are drawn into one report and compared.
    """
    from plots.compare import parse_condition
    from plots.data import ReportError, newest

    try:
        for text in conditions:
            parse_condition(text)
    except ReportError as error:
        raise click.UsageError(str(error)) from error
    try:
        chosen = folders or (newest(Path(DEFAULT_ROOT)),)
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
    """Write a report, print its comparison and where it lies, and return the conditions that failed."""
    from plots.compare import failed_conditions
    from plots.data import ReportError
    from plots.report import write_report
    from plots.tables import ablation_table, answer_lines, markdown, terminal_table, trouble_lines

    try:
        report = write_report(folders, out, timelines)
    except OSError as error:
        where, cause = error.filename or out or folders[-1], error.strerror or error
        raise ReportError(f"{where}: {cause}: the report can't be written (--out)") from None
    if as_markdown:
        click.echo(markdown(report.results, report.comparisons))
    else:
        console = verbatim_console(highlight=False)
        for ablation in report.ablations:
            console.print(ablation_table(ablation))
        # A column for each of its configurations would be too narrow; the page has them all.
        told = {a.workload for a in report.ablations} if len(folders) == 1 else set()
        for comparison in report.comparisons:
            if comparison.workload not in told:
                console.print(terminal_table(comparison))
        for line in answer_lines(report.results):
            console.print(line, style="bold", soft_wrap=True)
        for line in trouble_lines(report.results):
            console.print(line, style="yellow", soft_wrap=True)
        for what, cause in report.results.failures.items():
            console.print(f"not measured: {what}: {cause}", style="red", soft_wrap=True)
    failed = failed_conditions(report.results, conditions)
    # On stderr with --markdown, whose output is meant to be piped into a comment.
    for path in report.files:
        if path != report.page:
            click.echo(str(path), err=as_markdown)
    click.echo(f"report: {report.page}", err=as_markdown)
    return failed
