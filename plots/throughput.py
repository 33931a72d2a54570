"""Throughput figure: output tokens/s at the highest sustained rate, bars by workload and configuration."""

import textwrap
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from plots.compare import percent, percent_text, throughput
from plots.data import Results, run_facts
from plots.style import MUTED, STYLE, WIDTH_IN, framed_figure, linear_y, palette, span, wrapped


def throughput_figure(results: Results, of_model: str = "") -> Figure:
    """One group of bars per workload, each bar with its value and its difference from the baseline.

    `of_model` follows the title, if there is a figure for each of several models.
    """
    workloads = [w for w in results.workloads if any(s.answer for s in results.of_workload(w))]
    configurations = results.configurations
    looks = palette(configurations)
    with matplotlib.rc_context(STYLE):
        footer = _caption(results)
        columns = _legend_columns(configurations)
        legend_rows = -(-len(configurations) // columns)
        head, foot = 0.5 + 0.24 * legend_rows, 0.45 + 0.17 * len(footer)
        height = 3.2 + head + foot
        handles = [Patch(color=looks[configuration][0], label=configuration) for configuration in configurations]
        title = f"{results.title}: throughput at the highest sustained rate{of_model}"
        look = {"ncols": columns, "handlelength": 1.1, "handleheight": 1.0, "labelspacing": 0.5}
        figure = framed_figure(title, handles, footer, height, **look)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.09, right=0.985, top=1 - (head + 0.12) / height, bottom=foot / height)
        _draw_bars(axes, results, workloads)
        return figure


def _draw_bars(axes: Axes, results: Results, workloads: list[str]) -> None:
    configurations = results.configurations
    looks = palette(configurations)
    values = {key: throughput(series) for key, series in results.series.items()}
    margin = 0.95 if len(workloads) == 1 else 0.6
    step = min(0.8 / len(configurations), 0.26)
    slot_pt = step / (len(workloads) - 1 + 2 * margin) * WIDTH_IN * 0.91 * 72
    for i, configuration in enumerate(configurations):
        base_name = results.baselines[configuration]
        for group, workload in enumerate(workloads):
            if (configuration, workload) not in values:
                continue
            x = group + (i - (len(configurations) - 1) / 2) * step
            value = values[configuration, workload]
            axes.bar(x, value or 0.0, step * 0.9, color=looks[configuration][0], zorder=3)
            difference = percent(value, values.get((base_name, workload))) if base_name != configuration else None
            _label_bar(axes, x, value, difference, (looks[configuration][0], slot_pt))
    per_name = 120 // max(len(workloads), 1)
    axes.set_xticks(range(len(workloads)), [textwrap.fill(name, per_name) for name in workloads])
    axes.tick_params(axis="x", length=0, labelsize=10.5)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-margin, len(workloads) - 1 + margin)
    axes.set_ylabel("Output tokens/s (higher is better)")
    linear_y(axes, [value for value in values.values() if value])
    axes.set_ylim(0, axes.get_ylim()[1] * 1.06)


def _label_bar(axes: Axes, x: float, value: float | None, difference: float | None, look: tuple[str, float]) -> None:
    """Write value and difference above a bar, in a font that fits `slot_pt`, the width in points."""
    color, slot_pt = look
    size = max(5.5, min(9.5, slot_pt / 4.2))
    how: Any = {"textcoords": "offset points", "ha": "center", "va": "bottom"}
    if value is None:
        axes.annotate("none\nsustained", (x, 0), (0, 4), fontsize=min(size, slot_pt / 6), color=MUTED, **how)
        return
    axes.annotate(f"{value:,.{0 if value >= 100 else 1}f}", (x, value), (0, 2), fontsize=size, **how)
    if difference is not None:
        place = (0, 4 + 1.15 * size)
        axes.annotate(percent_text(difference), (x, value), place, fontsize=size, weight="bold", color=color, **how)


def _caption(results: Results) -> list[str]:
    drawn = [d for s in results.series.values() for d in s.curve]
    samples = f"Samples per load point: {span([d.requests for d in drawn])} requests"
    facts = run_facts(results, results.configurations, samples)
    if len(results.configurations) > 1:
        bases = list(dict.fromkeys(results.baselines.values()))
        facts.append(f"Bold: difference from {bases[0] if len(bases) == 1 else 'the first results'}")
    if any(s.answer and s.answer.provisional for s in results.series.values()):
        facts.append("Some answers are provisional")
    return wrapped(facts)


def _legend_columns(configurations: list[str]) -> int:
    longest = max((len(name) for name in configurations), default=1)
    return max(1, min(len(configurations), 130 // (longest + 6)))
