"""Base of the horizontal bar charts that `make bench-…` draws from a list of records."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.data import ReportError
from plots.style import WIDTH_IN

_HEAD_IN, _FOOT_IN, _LINE_IN = 1.05, 0.8, 0.17  # heights above the bars, below them, and of a caption line


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
