"""Figure of `make bench-kv`: what share of prompt tokens was found, where, and the time to the first token."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.style import COLORS, STYLE, wrapped
from tests.perf.bar_charts import add_texts, bar_figure, draw_rounds, name_rows

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
        panels[1].set_title("Time to the first token")
        draw_rounds(panels[1], records, places, "ttft", {"p50": COLORS[0], "p95": COLORS[0]})
        name_rows(panels[0], [row["server"] for row in records], places)
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
