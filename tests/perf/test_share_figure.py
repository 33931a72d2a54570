from typing import Any

import pytest

from tests.perf.share_figure import share_figure
from tests.plots.test_figures import assert_apart, assert_nothing_clipped


def rows() -> list[dict[str, Any]]:
    made = []
    for layers, step_ms in ((2, 9.0), (8, 24.0), (30, 95.0)):
        for engine, outside in (("v1", 0.03), ("v0", 1.4)):
            times = {"step_ms": step_ms + outside, "device_ms": step_ms, "outside_ms": outside, "core_ms": 0.2}
            what = {"model": "smollm2-135m", "layers": layers, "engine": engine, "streams": 32, "rounds": 3}
            made.append({**what, **times, "frontend_ms": 0.7, "steps": 188.0, "hardware": "Intel Xeon, 1 core"})
    return made


def test_bars_are_shares_of_the_step() -> None:
    made = rows()
    time, cpu = share_figure(made).axes
    widths = [bar.get_width() for bar in time.patches]
    for row, device, outside in zip(made, widths[::2], widths[1::2], strict=True):
        assert device == pytest.approx(100 * row["device_ms"] / row["step_ms"])
        assert device + outside == pytest.approx(100)
    core, front_end = cpu.patches[0], cpu.patches[1]
    assert core.get_width() == pytest.approx(100 * 0.2 / 9.03)
    assert front_end.get_x() == pytest.approx(core.get_width())
    assert "9.03 ms, 0.3 % outside" in [text.get_text() for text in time.texts]


def test_it_says_what_it_shows_and_is_legible() -> None:
    figure = share_figure(rows())
    said = " ".join(text.get_text() for text in figure.texts)
    for fact in ("one token for each of 32 requests", "Intel Xeon", "random weights", "Medians of 3 runs"):
        assert fact in said
    assert_nothing_clipped(figure)
    assert_apart(figure)
