from typing import Any

import pytest

from tests.perf.neighbor_figure import neighbor_figure
from tests.plots.test_figures import assert_apart, assert_nothing_clipped

BESIDE = (("none", 1.0, 0.0), ("half", 0.6, 0.4), ("busy", 0.45, 0.5))


def rows() -> list[dict[str, Any]]:
    made = []
    for engine, alone in (("redline", 700.0), ("vllm", 450.0)):
        for workload, times in (("single", 0.1), ("x16", 1.0)):
            for neighbor, kept, share in BESIDE:
                what = {"engine": engine, "workload": workload, "neighbor": neighbor, "model": "smollm2-135m"}
                rates = {"output_tok_s": alone * times * kept, "kept": kept, "left": 1 - share}
                more = {
                    "itl_p99_ms": 20 / kept,
                    "neighbor_share": share,
                    "rounds": 3,
                    "hardware": "Intel Xeon, 2 cores",
                }
                made.append({**what, **rates, **more})
    return made


def test_bars_are_grouped_and_a_line_marks_what_was_left() -> None:
    throughput, itl = neighbor_figure(rows()).axes
    assert [bar.get_width() for bar in throughput.patches] == [row["output_tok_s"] for row in rows()]
    assert [bar.get_width() for bar in itl.patches] == [row["itl_p99_ms"] for row in rows()]
    marks = [next(iter(line.get_xdata())) for line in throughput.lines]
    assert marks == pytest.approx([left * row["output_tok_s"] for row in rows()[::3] for left in (0.6, 0.5)])


def test_it_says_what_it_shows_and_is_legible() -> None:
    figure = neighbor_figure(rows())
    said = " ".join(text.get_text() for text in figure.texts)
    for fact in (
        "computes for 5 ms and sleeps for 5 ms",
        "beside vLLM 40% to 40% and 50% to 50%",
        "Intel Xeon",
        "medians of 3 runs",
    ):
        assert fact in said
    assert_nothing_clipped(figure)
    assert_apart(figure)
