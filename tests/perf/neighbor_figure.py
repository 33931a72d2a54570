"""Figure of `make bench-neighbor`: throughput and P99 ITL with and without a neighbor on the cores, by engine."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.style import COLORS, MUTED, STYLE, plain, wrapped
from tests.perf.bar_charts import add_texts, bar_figure

KINDS = {
    "none": ("alone", "#cbd5e1"),
    "half": ("neighbor that wants half of each core", COLORS[1]),
    "busy": ("neighbor that always computes", COLORS[0]),
}
NAMES = {"redline": "Redline", "vllm": "vLLM"}
WORKLOADS = {"single": "one stream", "x16": "16 streams"}
_BAR_IN, _APART, _NAMES_IN = 0.27, 0.7, 1.5


def neighbor_figure(rows: list[dict[str, Any]]) -> Figure:
    """Left: output tokens/s; a line marks what the time that the neighbor left over would give. Right: P99 ITL."""
    count = len(KINDS)
    places = [number + _APART * (number // count) for number in range(len(rows))]
    with matplotlib.rc_context(STYLE):
        footer = _caption(rows)
        boxes = (_NAMES_IN, 3.9), (_NAMES_IN + 4.5, 2.9)
        figure, panels, height = bar_figure(places, _BAR_IN, len(footer), boxes)
        _draw(panels[0], rows, places, "output_tok_s", "Throughput", "output tokens/s")
        _draw(panels[1], rows, places, "itl_p99_ms", "P99 ITL", "ms")
        for number, (row, place) in enumerate(zip(rows, places, strict=True)):
            alone = rows[number // count * count]
            if row is not alone:
                fair = alone["output_tok_s"] * row["left"]
                panels[0].plot([fair, fair], [place - 0.46, place + 0.46], color=MUTED, linewidth=1.6)
            else:
                panels[0].annotate(
                    f"{NAMES.get(row['engine'], row['engine'])}, {WORKLOADS[row['workload']]}", (0, place + 1), (-9, 0),
                    xycoords=panels[0].get_yaxis_transform(), textcoords="offset points", ha="right", va="center",
                    fontsize=9.5,
                )  # fmt: skip
        handles = [(color, text) for text, color in KINDS.values()]
        add_texts(figure, "An engine beside another program on its cores", handles, 3, footer, height)
        return figure


def _draw(axes: Axes, rows: list[dict[str, Any]], places: list[float], key: str, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(unit)
    for row, place in zip(rows, places, strict=True):
        beside = row["neighbor"] != "none"
        axes.barh(place, row[key], 0.86, color=KINDS[row["neighbor"]][1])
        kept = f" ({row['kept']:.0%})" if beside and key == "output_tok_s" else ""
        text = f"{plain(row[key])}{kept}"
        axes.annotate(text, (row[key], place), (6, 0), textcoords="offset points", fontsize=9, va="center")
    axes.set_xlim(0, 1.35 * max(row[key] for row in rows))


def _caption(rows: list[dict[str, Any]]) -> list[str]:
    def got(kind: str) -> str:
        shares = [row["neighbor_share"] for row in rows if row["neighbor"] == kind]
        return f"{min(shares):.0%} to {max(shares):.0%}"

    first = rows[0]
    facts = [
        f"Model: {first['model']}; requests of 128/128 tokens over HTTP",
        f"Neighbor: one process on each core; the first computes for 5 ms and sleeps for 5 ms and got {got('half')} of "
        f"the cores' time, the second got {got('busy')}",
        "Line: what the rest of the cores' time would give",
        f"Hardware: {first['hardware']}; medians of {first['rounds']} runs",
    ]
    return wrapped(facts)
