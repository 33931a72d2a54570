from typing import Any

import pytest

from tests.perf.ranks_figure import ranks_figure
from tests.plots.test_figures import assert_apart, assert_nothing_clipped


def rows() -> list[dict[str, Any]]:
    made = []
    for ranks in (2, 4):
        for size in (16, 64, 256):
            v0 = 240 * size
            measured = [("v1", 42, 380.0), ("v1-tcp", 114, 640.0), ("v0", v0, 3600.0), ("v0-joined", v0, 900.0)]
            for engine, sent, us in measured:
                us *= ranks
                times = {"bytes": sent, "us": us, "us_low": us - 50, "us_high": us + 900, "steps": 200}
                what = {"engine": engine, "ranks": ranks, "rows": size, "context": 512, "block_size": 16}
                made.append({**what, **times, "model": "2 layers", "hardware": "Intel Xeon, 2 cores for all ranks"})
    return made


def test_bars_are_bytes_and_times_of_a_step() -> None:
    made = rows()
    sent, time = ranks_figure(made).axes
    assert [bar.get_width() for bar in sent.patches] == pytest.approx([row["bytes"] / 1e3 for row in made])
    assert [bar.get_width() for bar in time.patches] == pytest.approx([row["us"] / 1e3 for row in made])
    assert [text.get_text() for text in sent.texts][:3] == ["42 B", "114 B", "3.8 kB"]
    assert [text.get_text() for text in time.texts][-1] == "3,600 µs"
    names = [text.get_text() for text in sent.texts]
    assert [name for name in names if name.startswith("batch")] == 2 * ["batch 16", "batch 64", "batch 256"]
    assert [name for name in names if name.startswith("--")] == ["--tp 2", "--tp 4"]


def test_it_says_what_it_shows_and_is_legible() -> None:
    figure = ranks_figure(rows())
    said = " ".join(text.get_text() for text in figure.texts)
    for fact in (
        "one token per request",
        "2 cores for all ranks",
        "Medians of 200 interleaved steps",
        "one at a time",
    ):
        assert fact in said
    assert_nothing_clipped(figure)
    assert_apart(figure)
