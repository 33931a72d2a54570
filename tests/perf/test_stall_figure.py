from typing import Any

import numpy as np
import pytest

from tests.perf.bench_mm_stall import per_gap
from tests.perf.stall_figure import stall_figure
from tests.perf.stall_load import pictures, salted
from tests.plots.test_figures import assert_apart, assert_nothing_clipped


def rows() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for engine, stalls in (("v1", 1.1), ("v1, processing inline", 6.0), ("v0", 9.0)):
        for load, factor in (("none", 1.0), ("beside", 1.05), ("processing", stalls), ("served", 1.3 * stalls)):
            gaps = {"gap_p50_ms": 21.0, "gap_p99_ms": 24.0 * factor, "gap_max_ms": 30.0 * factor}
            ratios = {"gap_p99_ratio": factor, "loop_p99_of_step": 0.012 * factor**2}
            facts = {"part": "stall", "model": "smollm2-135m-vision", "streams": 8, "rounds": 3}
            seen = {"picture": "PNG, 1275x1650", "hardware": "Intel Xeon, 1 core for core and worker"}
            made.append({**facts, **seen, "engine": engine, "load": load, **gaps, **ratios})
    return [*made, {"part": "pool", "model": "smollm2-135m-vision", "processes": 1}]


def test_points_are_the_gaps() -> None:
    gaps, loop = stall_figure(rows()).axes
    drawn = [line.get_xdata() for line in gaps.lines]
    for row, points in zip(rows(), zip(*[iter(drawn)] * 4, strict=True), strict=False):
        expected = [row[key] for key in ("gap_p50_ms", "gap_p99_ms", "gap_max_ms")]
        assert [list(point) for point in points[1:]] == [[value] for value in expected]
    assert [bar.get_width() for bar in loop.patches] == pytest.approx(
        [100 * row["loop_p99_of_step"] for row in rows()[:-1]]
    )


def test_it_says_what_it_shows_and_is_legible() -> None:
    figure = stall_figure(rows())
    said = " ".join(text.get_text() for text in figure.texts)
    for fact in ("8 text requests", "1275x1650", "Intel Xeon", "3 runs", "refused"):
        assert fact in said
    assert_nothing_clipped(figure)
    assert_apart(figure)


def test_the_loops_own_time_belongs_to_the_gap_in_which_its_turn_ended() -> None:
    steps = np.array([[0, 10, 8], [12, 20, 8], [21, 25, 1], [26, 40, 9], *([41 + i, 50 + i, 8] for i in range(9))])
    steps[:, :2] *= 1_000_000
    turns = np.array([[1, 5, 3], [11, 12, 4], [13, 21, 5], [30, 35, 6]]) * 1_000_000
    gaps, own = per_gap(steps, turns, streams=8)
    assert gaps.tolist() == [10.0, 20.0, 10.0, *[1.0] * 8]
    assert own.tolist() == [4.0, 11.0, *[0.0] * 9]


def test_requests_that_get_no_more_tokens_have_a_gap_until_the_time_is_over() -> None:
    steps = np.array([[0, 10, 8], [12, 20, 8], [21, 25, 1]]) * [1_000_000, 1_000_000, 1]
    turns = np.array([[11, 12, 4], [21, 26, 5]]) * 1_000_000
    gaps, own = per_gap(steps, turns, 8, (15_000_000, 120_000_000))
    assert gaps.tolist() == [5.0, 100.0]
    assert own.tolist() == [0.0, 5.0]


def test_salted_pictures_are_the_same_pictures() -> None:
    import io

    from PIL import Image

    png = pictures((40, 30), 1)[0]
    one, other = salted(png, "1"), salted(png, "2")
    assert len({png, one, other}) == 3
    shown = [np.asarray(Image.open(io.BytesIO(data))) for data in (png, one, other)]
    assert (shown[0] == shown[1]).all()
    assert (shown[0] == shown[2]).all()
