"""Figure of `make bench-pause`: the longest gap of any stream while long prompts come in, by engine and budget."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plots.style import COLORS, MUTED, STYLE, wrapped
from tests.perf.bar_charts import add_texts, bar_figure

GAP_LIMIT_MS = 150.0
ENGINES = {"Redline": COLORS[0], "vLLM": COLORS[1]}
_ROW_IN, _NAMES_IN = 0.42, 2.2


def pause_figure(records: list[dict[str, Any]]) -> Figure:
    """Left: the longest gap of each round, and their median. Right: the time until all prompts had a first token."""
    places = [float(number) for number in range(len(records))]
    with matplotlib.rc_context(STYLE):
        footer = _caption(records)
        figure, panels, height = bar_figure(places, _ROW_IN, len(footer), ((_NAMES_IN, 4.7), (_NAMES_IN + 5.1, 2.3)))
        _draw_gaps(panels[0], records, places)
        _draw_prompts(panels[1], records, places)
        for row, place in zip(records, places, strict=True):
            budget = "default" if row["budget"] is None else f"{row['budget']} tokens"
            panels[0].annotate(
                f"{row['engine']}, {budget}", (0, place), (-9, 0), xycoords=panels[0].get_yaxis_transform(),
                textcoords="offset points", ha="right", va="center", fontsize=9.5,
            )  # fmt: skip
        handles = [(color, name) for name, color in ENGINES.items() if any(row["engine"] == name for row in records)]
        add_texts(figure, "Streams while long prompts come in", handles, 2, footer, height)
        return figure


def _draw_gaps(axes: Axes, records: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("Longest gap of any stream")
    for row, place in zip(records, places, strict=True):
        color = ENGINES[row["engine"]]
        axes.plot(row["gaps_ms"], [place] * len(row["gaps_ms"]), "o", color=color, markersize=4, alpha=0.6)
        axes.plot([row["gap_ms"]], [place], "|", color=color, markersize=16, markeredgewidth=2.2)
    axes.axvline(GAP_LIMIT_MS, color=MUTED, linewidth=1, linestyle="--")
    axes.set_xlim(0, 1.08 * max(GAP_LIMIT_MS, *(row["gap_max_ms"] for row in records)))
    axes.set_xlabel("ms: rounds •, their median |")


def _draw_prompts(axes: Axes, records: list[dict[str, Any]], places: list[float]) -> None:
    axes.set_title("All prompts computed after")
    seconds = [row["prompts_ms"] / 1e3 for row in records]
    for row, place, value in zip(records, places, seconds, strict=True):
        axes.barh(place, value, 0.6, color=ENGINES[row["engine"]])
        axes.annotate(f"{value:.2f} s", (value, place), (5, 0), textcoords="offset points", fontsize=9, va="center")
    axes.set_xlim(0, 1.4 * max(seconds))
    axes.set_xlabel("s")


def _caption(records: list[dict[str, Any]]) -> list[str]:
    first = records[0]
    facts = [
        f"Model: {first['model']}; {first['streams']} streams decode, then {first['prompts']} prompts of "
        f"{first['prompt_tokens']:,} tokens come at once; {first['rounds']} rounds",
        "Tokens: the token budget of a step (--max-num-batched-tokens)",
        f"Hardware: {first['hardware']}",
    ]
    return wrapped(facts)
