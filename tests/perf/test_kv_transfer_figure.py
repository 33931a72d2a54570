from typing import Any

import pytest

from tests.perf.bench_kv_transfer import WAYS, rows_of
from tests.perf.kv_transfer_figure import kv_transfer_figure
from tests.plots.test_figures import assert_apart, assert_nothing_clipped

TOLD = {
    "prompt": 1024, "output": 16, "streams": 8, "gap_s": 0.5, "prompts": 24, "hardware": "AMD EPYC, 2 cores",
}  # fmt: skip


def rounds(scale: float) -> list[dict[str, float]]:
    """Of three rounds, the third slower."""
    return [
        {"itl_p50_ms": 12 * slow, "itl_p99_ms": 50 * slow * scale, "itl_max_ms": 120.0, "ttft_p50_ms": 900 * slow,
         "ttft_p99_ms": 2100 * slow / scale}
        for slow in (1.0, 1.1, 1.4)
    ]  # fmt: skip


def records() -> list[dict[str, Any]]:
    return rows_of(dict(zip(WAYS, (rounds(1.0), rounds(2.0)), strict=True)), TOLD)


def test_a_row_has_the_medians_and_each_round() -> None:
    first, second = records()
    assert [first["way"], second["way"]] == list(WAYS)
    assert first["rounds"] == 3
    assert first["itl_p99_ms_rounds"] == pytest.approx([50, 55, 70])
    assert second["itl_p99_ms"] == pytest.approx(110)
    assert first["ttft_p50_ms"] == pytest.approx(990)


def test_the_rounds_and_their_median_are_drawn() -> None:
    itl, ttft = kv_transfer_figure(records()).axes
    for axes, metric in ((itl, "itl"), (ttft, "ttft")):
        drawn = [list(line.get_xdata()) for line in axes.lines]
        expected = []
        for row in records():
            for name in ("p50", "p99"):
                expected += [row[f"{metric}_{name}_ms_rounds"], [row[f"{metric}_{name}_ms"]]]
        assert drawn == expected


def test_it_says_what_it_shows_and_is_legible() -> None:
    figure = kv_transfer_figure(records())
    said = " ".join(text.get_text() for text in figure.texts)
    for fact in ("8 streams", "every 0.5 s a prompt of 1,024 tokens", "24 in each of 3 rounds", "AMD EPYC"):
        assert fact in said
    assert_nothing_clipped(figure)
    assert_apart(figure)
