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
        for row, place in zip(rows, places, strict=True):
            if row["neighbor"] != "none":
                fair = _fair_rate(row)
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


def _fair_rate(row: dict[str, Any]) -> float:
    """Throughput alone times the share of the cores' time that the neighbor left over."""
    return float(row["output_tok_s"] / row["kept"] * row["left"])


def _draw(axes: Axes, rows: list[dict[str, Any]], places: list[float], key: str, title: str, unit: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(unit)
    for row, place in zip(rows, places, strict=True):
        beside = row["neighbor"] != "none" and key == "output_tok_s"
        end = max(row[key], _fair_rate(row)) if beside else row[key]
        axes.barh(place, row[key], 0.86, color=KINDS[row["neighbor"]][1])
        kept = f" ({row['kept']:.0%})" if beside else ""
        text = f"{plain(row[key])}{kept}"
        axes.annotate(text, (end, place), (6, 0), textcoords="offset points", fontsize=9, va="center")
    axes.set_xlim(0, 1.35 * max(row[key] for row in rows))


def _caption(rows: list[dict[str, Any]]) -> list[str]:
    def got(engine: str, kind: str) -> str:
        shares = [row["neighbor_share"] for row in rows if (row["engine"], row["neighbor"]) == (engine, kind)]
        return f"{min(shares):.0%} to {max(shares):.0%}"

    first, engines = rows[0], dict.fromkeys(row["engine"] for row in rows)
    shares = "; ".join(f"beside {NAMES[name]} {got(name, 'half')} and {got(name, 'busy')}" for name in engines)
    facts = [
        f"Model: {first['model']}; requests of 128/128 tokens over HTTP",
        "Neighbor: one process on each core, which computes for 5 ms and sleeps for 5 ms, or always computes",
        f"It got of the cores' time: {shares}",
        "Line: what the rest of the cores' time would give",
        f"Hardware: {first['hardware']}; medians of {first['rounds']} runs",
    ]
    return wrapped(facts)
