"""Base of the horizontal bar charts that `make bench-…` draws from a list of records."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from plots.data import ReportError
from plots.style import WIDTH_IN, footnote, headline, legend_below_headline, save

_HEAD_IN, _FOOT_IN, _LINE_IN = 1.05, 0.8, 0.17  # heights above the bars, below them, and of a caption line


def save_figure(draw: Callable[[list[dict[str, Any]]], Figure], results: Path, picture: Path) -> list[Path]:
    """Draw the records of a JSON file as PNG and SVG; raises ReportError if there are none."""
    return save(draw(read_records(results)), picture)


def read_records(results: Path) -> list[dict[str, Any]]:
    """The records of a JSON file; raises ReportError if there are none."""
    try:
        records: list[dict[str, Any]] = json.loads(results.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{results} cannot be read: {error}") from error
    if not records:
        raise ReportError(f"{results} has no records")
    return records


def bar_figure(
    places: Sequence[float], bar_in: float, lines: int, boxes: Sequence[tuple[float, float]]
) -> tuple[Figure, list[Axes], float]:
    """A figure, its panels, and its height in inches.

    Args:
        places: positions of the bars from the top, as multiples of `bar_in`.
        bar_in: height of a bar in inches.
        lines: number of caption lines.
        boxes: left edge and width of each panel in inches.
    """
    foot, body = _FOOT_IN + _LINE_IN * lines, bar_in * (places[-1] + 1)
    height = _HEAD_IN + body + foot
    figure = Figure(figsize=(WIDTH_IN, height))
    panels = []
    for left, width in boxes:
        axes = figure.add_axes((left / WIDTH_IN, foot / height, width / WIDTH_IN, body / height))
        axes.set_ylim(places[-1] + 0.5, -0.5)
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        panels.append(axes)
    return figure, panels, height


def name_rows(axes: Axes, names: Sequence[str], places: Sequence[float]) -> None:
    """Write the names of rows to the left of a panel."""
    for name, place in zip(names, places, strict=True):
        axes.annotate(
            name, (0, place), (-9, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right",
            va="center", fontsize=9.5,
        )  # fmt: skip


def draw_rounds(
    axes: Axes, records: Sequence[dict[str, Any]], places: Sequence[float], metric: str, percentiles: Mapping[str, str]
) -> None:
    """Draw two percentiles of each record: the value of each round, and their median.

    Args:
        metric: a record has the median of p50 in ms as METRIC_p50_ms, and that of each round in METRIC_p50_ms_rounds.
        percentiles: their colors, by name.
    """
    for row, place in zip(records, places, strict=True):
        for (name, color), offset in zip(percentiles.items(), (-0.16, 0.16), strict=True):
            each, value = row[f"{metric}_{name}_ms_rounds"], row[f"{metric}_{name}_ms"]
            axes.plot(each, [place + offset] * len(each), "o", color=color, markersize=4, alpha=0.6)
            axes.plot([value], [place + offset], "|", color=color, markersize=11, markeredgewidth=2.2)
            axes.annotate(
                f"P{name[1:]} {value:.0f}", (max(each), place + offset), (7, 0), textcoords="offset points",
                fontsize=8.5, va="center",
            )  # fmt: skip
    longest = max(max(row[f"{metric}_{name}_ms_rounds"]) for row in records for name in percentiles)
    axes.set_xlim(0, 1.25 * longest)
    axes.set_xlabel("ms: rounds •, their median |")


def add_texts(
    figure: Figure, title: str, handles: Sequence[tuple[str, str]], columns: int, footer: Sequence[str], height: float
) -> None:
    """Add the headline, the legend and the caption.

    Args:
        handles: color and name of each entry of the legend, in `columns` columns.
        footer: lines of the caption.
        height: of the figure, in inches.
    """
    headline(figure, title, height)
    patches = [Patch(color=color, label=name) for color, name in handles]
    legend_below_headline(figure, patches, height, ncols=columns, handlelength=1.1, handleheight=1.0)
    footnote(figure, footer, height)
