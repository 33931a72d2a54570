"""Figure of `make bench-kv-transfer`: gaps between tokens of streams, and times to first tokens, by roles."""

from typing import Any

import matplotlib
from matplotlib.figure import Figure

from plots.style import COLORS, STYLE, wrapped
from tests.perf.bar_charts import add_texts, bar_figure, draw_rounds, name_rows

_ROW_IN, _NAMES_IN = 0.7, 1.9
PERCENTILES = {"p50": COLORS[0], "p99": COLORS[1]}


def kv_transfer_figure(records: list[dict[str, Any]]) -> Figure:
    """ITL of the streams and TTFT of the prompts at P50 and P99, each round and the median."""
    places = [float(number) for number in range(len(records))]
    with matplotlib.rc_context(STYLE):
        footer = _caption(records[0])
        figure, panels, height = bar_figure(places, _ROW_IN, len(footer), ((_NAMES_IN, 3.3), (_NAMES_IN + 3.8, 3.3)))
        for axes, metric, title in zip(
            panels, ("itl", "ttft"), ("Gaps between tokens of the streams", "First tokens of the prompts"), strict=True
        ):
            axes.set_title(title)
            draw_rounds(axes, records, places, metric, PERCENTILES)
        name_rows(panels[0], [row["way"] for row in records], places)
        handles = [(color, name.upper()) for name, color in PERCENTILES.items()]
        add_texts(figure, "Prefill and decode replicas beside two that do both", handles, 2, footer, height)
        return figure


def _caption(first: dict[str, Any]) -> list[str]:
    facts = [
        f"{first['streams']} streams run all the time; every {first['gap_s']:g} s a prompt of {first['prompt']:,} "
        f"tokens comes with {first['output']} of output, {first['prompts']} in each of {first['rounds']} rounds",
        f"Hardware: {first['hardware']}",
    ]
    return wrapped(facts)
