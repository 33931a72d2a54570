"""Figure of `make bench-kv`: what share of prompt tokens was found, where, and the time to the first token."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.style import COLORS, STYLE, wrapped
from tests.perf.bar_charts import add_texts, bar_figure

OFF = "dropped"  # what becomes of evicted blocks without the flag
TIERS = {"KV cache": COLORS[0], "host memory": COLORS[1], "files": COLORS[2]}
_ROW_IN, _NAMES_IN = 0.5, 2.0


def kv_figure(records: list[dict[str, Any]]) -> Figure:
    """Left: prompt tokens found by tier. Right: TTFT at P50 and P95, each round and the median."""
    places = [float(number) for number in range(len(records))]
    with matplotlib.rc_context(STYLE):
        footer = _caption(records)
        figure, panels, height = bar_figure(places, _ROW_IN, len(footer), ((_NAMES_IN, 3.0), (_NAMES_IN + 3.5, 4.0)))
        _draw_hits(panels[0], records, places)
        _draw_ttft(panels[1], records, places)
        for row, place in zip(records, places, strict=True):
            panels[0].annotate(
                row["server"], (0, place), (-9, 0), xycoords=panels[0].get_yaxis_transform(),
                textcoords="offset points", ha="right", va="center", fontsize=9.5,
            )  # fmt: skip
        handles = [(color, f"found in {name}") for name, color in TIERS.items()]
        add_texts(
            figure, "Conversations of four times the KV cache, by where evicted blocks go", handles, 3, footer, height
        )
        return figure


def _draw_hits(axes: Axes, records: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("Prompt tokens found")
    for row, place in zip(records, places, strict=True):
        shares = [row["hit_rate"] - row["host_rate"] - row["disk_rate"], row["host_rate"], row["disk_rate"]]
        left = 0.0
        for share, color in zip(shares, TIERS.values(), strict=True):
            axes.barh(place, 100 * share, 0.6, left=left, color=color)
            left += 100 * share
        axes.annotate(f"{left:.0f} %", (left, place), (5, 0), textcoords="offset points", fontsize=9, va="center")
    axes.set_xlim(0, 115)
    axes.set_xlabel("%")


def _draw_ttft(axes: Axes, records: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("Time to the first token")
    for row, place in zip(records, places, strict=True):
        for name, offset in (("p50", -0.16), ("p95", 0.16)):
            each = row[f"ttft_{name}_ms_rounds"]
            axes.plot(each, [place + offset] * len(each), "o", color=COLORS[0], markersize=4, alpha=0.6)
            value = row[f"ttft_{name}_ms"]
            axes.plot([value], [place + offset], "|", color=COLORS[0], markersize=11, markeredgewidth=2.2)
            axes.annotate(
                f"P{name[1:]} {value:.0f}", (max(each), place + offset), (7, 0), textcoords="offset points",
                fontsize=8.5, va="center",
            )  # fmt: skip
    axes.set_xlim(0, 1.25 * max(max(row["ttft_p95_ms_rounds"]) for row in records))
    axes.set_xlabel("ms: rounds •, their median |")


def _caption(records: list[dict[str, Any]]) -> list[str]:
    first = records[0]
    facts = [
        f"{first['conversations']} conversations of {first['turns']} turns of {first['input']} tokens in and "
        f"{first['output']} out; their mean history is {first['working_set']} KV blocks, the KV cache has "
        f"{first['kv_blocks']}",
        f"{first['requests']} requests at {first['rate']:.1f} per second, {first['rounds']} rounds",
        f"Hardware: {first['hardware']}",
    ]
    return wrapped(facts)
