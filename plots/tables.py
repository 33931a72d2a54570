"""The comparison as tables, for the terminal and in markdown."""

from rich.table import Table
from rich.text import Text

from bench.results import PointRecord
from plots.ablation import Ablation, Measured, ablations
from plots.compare import Cell, Comparison, Metric, percent_text
from plots.data import Results
from plots.latency import series_text
from plots.simulated import error_texts

SMALL = 0.5  # percent: smaller differences are neither better nor worse


def number(value: float | None) -> str:
    """A value for a table cell: three significant digits, thousands separated; "–" if it was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(metric: Metric, cell: Cell) -> str:
    """ "better", "worse" or "" for a cell's difference."""
    if cell.difference is None or abs(cell.difference) < SMALL:
        return ""
    return "better" if (cell.difference > 0) == metric.higher_is_better else "worse"


def heading(comparison: Comparison) -> str:
    return f"{comparison.workload}: " + (f"latencies {at}" if (at := comparison.latencies_at) else "offline")


def terminal_table(comparison: Comparison) -> Table:
    """One row per metric, one column per configuration: readable in 80 columns."""
    table = Table(title=heading(comparison), title_justify="left", title_style="bold", header_style="bold")
    table.add_column("")
    for name in comparison.rows:
        table.add_column(name, justify="right", overflow="fold")
    for metric in comparison.metrics:
        between = " " if len(comparison.rows) <= 2 else "\n"
        cells = [_terminal_cell(metric, row[metric.key], between) for row in comparison.rows.values()]
        table.add_row(f"{metric.label}, {metric.unit}", *cells)
    return table


def ablation_table(ablation: Ablation) -> Table:
    """One row per configuration of an ablation; significant differences in bold."""
    table = Table(title=ablation.heading, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("")
    for metric in ablation.columns:
        table.add_column(f"{metric.label}, {metric.unit}", justify="right")
    for row in ablation.rows:
        table.add_row(row.configuration, *(_ablation_cell(row.cells[m.key]) for m in ablation.columns))
    return table


def simulated_lines(results: Results) -> list[str]:
    """The title, which names the simulated hardware, and the errors of its latencies; none if all was measured."""
    errors = error_texts(results.summaries)
    return [results.title, *errors] if errors else []


def answer_lines(results: Results) -> list[str]:
    """One line per (configuration, workload): what it sustains and its binding."""
    lines = []
    for workload in results.workloads:
        for series in results.of_workload(workload):
            binding = f"; binding: {series.answer.binding}" if series.answer else ""
            lines.append(f"{series.configuration} / {workload}: {series_text(series)}{binding}")
    return lines


def trouble(point: PointRecord) -> str:
    """A text about a load point that is invalid, undecided, disturbed, or has failed requests; else ""."""
    kinds = point.failure_text() or (f"{point.failed}" if point.failed else "")
    if point.valid and not kinds and not point.disturbed and not point.undecided:
        return ""
    state = point.reason if point.undecided else "valid" if point.valid else f"invalid: {point.reason}"
    text = f"at {point.rate:.3g} req/s ({point.phase}), {state}"
    disturbed = f"; disturbed: {point.disturbance}" if point.disturbed else ""
    return text + (f"; failed requests: {kinds}" if kinds else "") + disturbed


def trouble_lines(results: Results) -> list[str]:
    """One line per load point that is invalid, undecided, disturbed or has failed requests."""
    points = [p for s in results.series.values() for p in s.points]
    return [f"{p.configuration} / {p.workload}: {text}" for p in points if (text := trouble(p))]


def markdown(results: Results, comparisons: list[Comparison]) -> str:
    """The comparison as markdown tables, one per workload."""
    parts = [f"## {results.title}", *(_ablation_markdown(ablation) for ablation in ablations(results))]
    for comparison in comparisons:
        lines = [_row(["", *(_escaped(name) for name in comparison.rows)])]
        lines.append(_row([":--"] + ["--:"] * len(comparison.rows)))
        for metric in comparison.metrics:
            cells = [_cell_text(row[metric.key]) for row in comparison.rows.values()]
            lines.append(_row([f"{metric.label}, {metric.unit}", *cells]))
        parts += [f"**{_escaped(heading(comparison))}**", "\n".join(lines)]
    parts.append("\n".join(f"- {_escaped(line)}" for line in answer_lines(results)))
    if results.failures:
        parts.append("\n".join(f"- failed: {_escaped(f'{k}: {v}')}" for k, v in results.failures.items()))
    parts.append("\n".join(f"- {_escaped(line)}" for line in trouble_lines(results)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _terminal_cell(metric: Metric, cell: Cell, between: str) -> Text:
    text = Text(number(cell.value))
    if cell.difference is not None:
        style = {"better": "green", "worse": "red", "": "dim"}[verdict(metric, cell)]
        text.append(between + percent_text(cell.difference), style=style)
    return text


def _ablation_cell(cell: Measured) -> Text:
    text = Text(number(cell.value))
    if cell.difference is not None:
        text.append(" " + percent_text(cell.difference), style="bold" if cell.clear else "dim")
    return text


def _ablation_markdown(ablation: Ablation) -> str:
    columns = ablation.columns
    lines = [_row(["", *(f"{m.label}, {m.unit}" for m in columns)]), _row([":--"] + ["--:"] * len(columns))]
    for row in ablation.rows:
        name = _escaped(f"{row.configuration}: {row.note}" if row.note else row.configuration)
        cells = []
        for cell in (row.cells[metric.key] for metric in columns):
            difference = percent_text(cell.difference) if cell.difference is not None else ""
            cells.append(" ".join([number(cell.value), f"**{difference}**" if cell.clear else difference]).rstrip())
        lines.append(_row([name, *cells]))
    table = "\n".join(lines)
    return f"**{_escaped(ablation.heading)}**\n\n{table}\n\nBold: the difference is significant (95 % confidence)."


def _cell_text(cell: Cell) -> str:
    difference = f" ({percent_text(cell.difference)})" if cell.difference is not None else ""
    return number(cell.value) + difference


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
