from typing import Any

from bench.results import RequestRecord
from tests.perf.bench_pause import longest_gap
from tests.perf.pause_figure import pause_figure
from tests.plots.test_figures import assert_apart, assert_nothing_clipped


def rows() -> list[dict[str, Any]]:
    made = []
    for engine, budget, gap in (("Redline", None, 90.0), ("Redline", 512, 210.0), ("vLLM", None, 620.0)):
        facts = {"model": "smollm2-135m", "streams": 16, "prompts": 4, "prompt_tokens": 1500, "rounds": 3}
        gaps = {"gap_ms": gap, "gap_max_ms": 1.2 * gap, "gaps_ms": [0.9 * gap, gap, 1.2 * gap], "prompts_ms": 2100.0}
        made.append({"engine": engine, "budget": budget, **facts, **gaps, "hardware": "Intel Xeon, 2 cores"})
    return made


def test_rounds_and_their_median_are_drawn() -> None:
    gaps, prompts = pause_figure(rows()).axes
    drawn = [list(line.get_xdata()) for line in gaps.lines]
    for row, points in zip(rows(), zip(drawn[::2], drawn[1::2], strict=False), strict=True):
        assert points == (row["gaps_ms"], [row["gap_ms"]])
    assert [bar.get_width() for bar in prompts.patches] == [2.1] * 3


def test_it_says_what_it_shows_and_is_legible() -> None:
    figure = pause_figure(rows())
    said = " ".join(text.get_text() for text in figure.texts)
    for fact in ("16 streams", "4 prompts of 1,500 tokens", "3 rounds", "Intel Xeon"):
        assert fact in said
    assert_nothing_clipped(figure)
    assert_apart(figure)


def test_a_gap_counts_if_it_overlaps_the_time() -> None:
    row = RequestRecord(0, 0.5, 0.5, 0.25, None, 1, 9, 5, 0, True, "cut short", "", [0.25, 1.0, 0.5, 2.0], [1] * 5)
    # chunks at 0.75, 1, 2, 2.5, 4.5
    assert longest_gap(row, 1.5, 2.25) == 1.0
    assert longest_gap(row, 2.0, 2.25) == 0.5
    assert longest_gap(row, 2.0, 3.0) == 2.0
    assert longest_gap(row, 5.0, 6.0) == 0.0
