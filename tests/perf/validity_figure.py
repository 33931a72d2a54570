"""Figure of `make bench-validity`: latencies against the request rate, measured and simulated."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from plots.style import COLORS, MARKERS, MUTED, STYLE, WIDTH_IN, framed_figure, log_y, wrapped

KINDS = {"ttft": "Time to first token (ms)", "itl": "Inter-token latency (ms)"}
PERCENTILES = ("p50", "p99")
_ROW_IN, _TOP_IN, _FOOT_IN = 2.1, 0.95, 0.75


def validity_figure(rows: list[dict[str, Any]], model: str, processor: str) -> Figure:
    """One line of panels for each workload. Measured: solid; simulated: dashed. Vertical lines: sustained rates."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    height = _TOP_IN + _ROW_IN * len(workloads) + _FOOT_IN
    with matplotlib.rc_context(STYLE):
        footer = wrapped(
            [
                f"Model: {model}; the same requests measured over HTTP and simulated in virtual time",
                "Vertical lines: the sustained rates",
                f"Hardware: {processor}",
            ]
        )
        figure = framed_figure(
            "Measured, and simulated from a profile of this machine", _handles(), footer, height, ncols=4
        )
        for line, workload in enumerate(workloads):
            bottom = _FOOT_IN + _ROW_IN * (len(workloads) - 1 - line) + 0.45
            for column, (kind, label) in enumerate(KINDS.items()):
                left = (0.75 + column * WIDTH_IN / 2) / WIDTH_IN
                place = (left, bottom / height, (WIDTH_IN / 2 - 0.95) / WIDTH_IN, (_ROW_IN - 0.75) / height)
                axes = figure.add_axes(place)
                _draw(axes, [row for row in rows if row["workload"] == workload], kind)
                axes.set_title(f"{workload}: {label}", fontsize=9.5)
                if line == len(workloads) - 1:
                    axes.set_xlabel("request rate (req/s)")
        return figure


def _draw(axes: Axes, rows: list[dict[str, Any]], kind: str) -> None:
    values: list[float] = []
    for color, marker, percentile in zip(COLORS, MARKERS, PERCENTILES, strict=False):
        mine = [row for row in rows if row["metric"] == f"{kind}_{percentile}_ms"]
        rates = [row["rate"] for row in mine]
        for side, style in (("measured", "-"), ("simulated", "--")):
            axes.plot(rates, [row[side] for row in mine], style, color=color, marker=marker, markersize=4)
            values += [row[side] for row in mine]
    sustained = next(row for row in rows if row["metric"] == "sustained")
    for side, style in (("measured", "-"), ("simulated", "--")):
        axes.axvline(sustained[side], color=MUTED, linestyle=style, linewidth=1)
    axes.set_xlim(left=0)
    log_y(axes, values)


def _handles() -> list[Line2D]:
    return [
        Line2D([], [], color=color, marker=marker, linestyle=style, label=f"{percentile.upper()} {side}")
        for color, marker, percentile in zip(COLORS, MARKERS, PERCENTILES, strict=False)
        for side, style in (("measured", "-"), ("simulated", "--"))
    ]
