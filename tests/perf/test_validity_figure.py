"""Rows of `make bench-validity` and their figure."""

from typing import Any

from tests.perf.bench_validity import METRICS, _row
from tests.perf.validity_figure import validity_figure
from tests.plots.test_figures import assert_apart, assert_nothing_clipped


def rows() -> list[dict[str, Any]]:
    found = []
    for workload, highest in (("100/100", 8.0), ("500/50", 3.0)):
        found.append(_row(workload, "sustained", None, highest, 0.95 * highest))
        for share in (0.3, 0.7, 1.0):
            for factor, metric in enumerate(METRICS, 1):
                value = 10 * factor * (1 + share**3)
                found.append(_row(workload, metric, share * highest, value, 1.1 * value))
    return found


def test_errors_are_those_of_the_simulation() -> None:
    assert rows()[0]["error"] == -0.05
    assert rows()[1]["error"] == 0.1


def test_measured_and_simulated_latencies_are_drawn() -> None:
    figure = validity_figure(rows(), "smollm2-135m", "A processor")
    assert len(figure.axes) == 4
    for axes in figure.axes:
        assert len(axes.lines) == 2 * 2 + 2
    said = " ".join(text.get_text() for text in figure.texts)
    assert "smollm2-135m" in said
    assert "A processor" in said
    assert_nothing_clipped(figure)
    assert_apart(figure)
