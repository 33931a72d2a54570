"""What pictures of lying bars have in common: those that `make bench-…` draws from a table of rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.data import ReportError
from plots.style import WIDTH_IN

_HEAD_IN, _FOOT_IN, _LINE_IN = 1.05, 0.8, 0.17  # above the bars, below them, and for each line of the caption


def read_rows(results: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; ReportError if there are none."""
    try:
        rows: list[dict[str, Any]] = json.loads(results.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{results} can't be read: {error}") from error
    if not rows:
        raise ReportError(f"{results} holds no rows")
    return rows


def bar_figure(
    places: Sequence[float], bar_in: float, lines: int, boxes: Sequence[tuple[float, float]]
) -> tuple[Figure, list[Axes], float]:
    """A figure, its panels (left edge and width in inches), and its height in inches.

    places: of the bars, from the top, in bars of `bar_in` inches; lines: of the caption.
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
