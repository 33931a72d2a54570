"""Offline figure: requests/s without a server by the share of repeated requests, bars by configuration."""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.results import PointRecord
from plots.data import OFFLINE, Results, run_facts
from plots.style import STYLE, framed_figure, linear_y, palette, span, wrapped

TITLE = "throughput by share of repeated requests"


def offline_points(results: Results) -> dict[tuple[str, str], PointRecord]:
    """The valid offline points, by configuration and workload."""
    return {
        key: point
        for key, series in results.series.items()
        for point in series.points
        if point.phase == OFFLINE and point.valid
    }


def offline_figure(results: Results) -> Figure | None:
    """One group of bars per workload, each bar with its value and its ratio to the first configuration.

    None without offline points.
    """
    points = offline_points(results)
    if not points:
        return None
    configurations = [c for c in results.configurations if any(c == name for name, _ in points)]
    workloads = [w for w in results.workloads if any(w == name for _, name in points)]
    looks = palette(configurations)
    facts = run_facts(results, configurations, f"Requests per bar: {span([p.requests for p in points.values()])}")
    footer = wrapped([*facts, f"Bold: ratio to {configurations[0]}"])
    head, foot = 0.8, 0.75 + 0.17 * len(footer)
    height = 3.2 + head + foot
    with matplotlib.rc_context(STYLE):
        handles = [Patch(color=looks[name][0], label=name) for name in configurations]
        groups = shares(results, workloads)
        title = f"{results.title}: {TITLE if groups != workloads else 'throughput'}"
        figure = framed_figure(title, handles, footer, height, ncols=len(configurations), handlelength=1.1)
        axes = figure.subplots()
        figure.subplots_adjust(left=0.09, right=0.985, top=1 - (head + 0.12) / height, bottom=foot / height)
        _draw_bars(axes, points, configurations, workloads)
        axes.set_xticks(range(len(workloads)), groups)
        axes.set_xlabel("Requests that repeat an earlier one" if groups != workloads else "")
        return figure


def shares(results: Results, workloads: list[str]) -> list[str]:
    """The labels of the groups: the share of repetitions if it differs, else the workload's name."""
    described = {name: spec for run in results.runs for name, spec in run.summary.workloads.items()}
    found = [described.get(name, {}).get("repeat") for name in workloads]
    return workloads if None in found or len(set(found)) < len(found) else [f"{share}%" for share in found]


def _draw_bars(
    axes: Axes, points: dict[tuple[str, str], PointRecord], configurations: list[str], workloads: list[str]
) -> None:
    looks = palette(configurations)
    step = 0.8 / max(len(configurations), 2)
    for i, configuration in enumerate(configurations):
        for group, workload in enumerate(workloads):
            point, base = points.get((configuration, workload)), points.get((configurations[0], workload))
            if point is None:
                continue
            x = group + (i - (len(configurations) - 1) / 2) * step
            axes.bar(x, point.achieved_rate, step * 0.9, color=looks[configuration][0], zorder=3)
            axes.annotate(
                f"{point.achieved_rate:.3g}", (x, point.achieved_rate), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=9,
            )  # fmt: skip
            if i and base is not None:
                axes.annotate(
                    f"{point.achieved_rate / base.achieved_rate:.2f} ×", (x, point.achieved_rate), (0, 14),
                    textcoords="offset points", ha="center", va="bottom", fontsize=9, weight="bold",
                    color=looks[configuration][0],
                )  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("Requests/s (higher is better)")
    linear_y(axes, [point.achieved_rate for point in points.values()])
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
