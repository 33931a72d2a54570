"""Figure of `make bench-neighbor`: throughput and P99 ITL with and without a neighbor on the cores, by engine."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.style import COLORS, MUTED, STYLE, plain, wrapped
from tests.perf.bar_charts import add_texts, bar_figure

ALONE, BESIDE = "#cbd5e1", COLORS[0]
NAMES = {"redline": "Redline", "vllm": "vLLM"}
_BAR_IN, _APART, _NAMES_IN = 0.3, 0.6, 1.6


def neighbor_figure(rows: list[dict[str, Any]]) -> Figure:
    """Left: output tokens/s; a line marks what the time that the neighbor left over would give. Right: P99 ITL."""
    places = [number + _APART * (number // 2) for number in range(len(rows))]
    with matplotlib.rc_context(STYLE):
        footer = _caption(rows)
        boxes = (_NAMES_IN, 3.9), (_NAMES_IN + 4.4, 2.9)
        figure, panels, height = bar_figure(places, _BAR_IN, len(footer), boxes)
        _draw(panels[0], rows, places, "output_tok_s", "Throughput", "output tokens/s")
        _draw(panels[1], rows, places, "itl_p99_ms", "P99 ITL", "ms")
        for alone, beside, place in zip(rows[::2], rows[1::2], places[1::2], strict=True):
            fair = alone["output_tok_s"] * beside["left"]
            panels[0].plot([fair, fair], [place - 0.46, place + 0.46], color=MUTED, linewidth=1.6)
            panels[0].annotate(
                f"{NAMES.get(alone['engine'], alone['engine'])}, {alone['workload']}", (0, place - 0.5), (-9, 0),
                xycoords=panels[0].get_yaxis_transform(), textcoords="offset points", ha="right", va="center",
                fontsize=9.5,
            )  # fmt: skip
        handles = [(ALONE, "alone"), (BESIDE, "with a neighbor on every core")]
        add_texts(figure, "Beside a neighbor that wants half of each core", handles, 2, footer, height)
        return figure


def _draw(axes: Axes, rows: list[dict[str, Any]], places: list[float], key: str, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(unit)
    for row, place in zip(rows, places, strict=True):
        axes.barh(place, row[key], 0.86, color=BESIDE if row["neighbor"] else ALONE)
        kept = f" ({row['kept']:.0%})" if row["neighbor"] and key == "output_tok_s" else ""
        text = f"{plain(row[key])}{kept}"
        axes.annotate(text, (row[key], place), (5, 0), textcoords="offset points", fontsize=9, va="center")
    axes.set_xlim(0, 1.35 * max(row[key] for row in rows))


def _caption(rows: list[dict[str, Any]]) -> list[str]:
    first, shares = rows[0], [row["neighbor_share"] for row in rows if row["neighbor"]]
    facts = [
        f"Model: {first['model']}; requests of 128/128 tokens over HTTP, one or 16 at once",
        f"Neighbor: a process on each core that computes for 5 ms and sleeps for 5 ms; it got "
        f"{min(shares):.0%} to {max(shares):.0%} of the cores' time",
        "Line: what the rest of the cores' time would give",
        f"Hardware: {first['hardware']}; medians of {first['rounds']} runs",
    ]
    return wrapped(facts)
