from typing import Any

import pytest

from tests.perf.bench_kv import Sizes, workload
from tests.perf.kv_figure import OFF, kv_figure
from tests.plots.test_figures import assert_apart, assert_nothing_clipped


def rows() -> list[dict[str, Any]]:
    made = []
    for server, found, host, disk, ttft in (
        (OFF, 0.12, 0.0, 0.0, 240.0),
        ("host memory", 0.85, 0.7, 0.0, 60.0),
        ("host memory and files", 0.84, 0.3, 0.4, 80.0),
    ):
        facts = {"conversations": 32, "turns": 6, "input": 128, "output": 32, "requests": 120, "rounds": 3}
        ttfts = {"ttft_p50_ms": ttft, "ttft_p95_ms": 3 * ttft, "ttft_p50_ms_rounds": [ttft, 1.1 * ttft, 0.9 * ttft]}
        ttfts["ttft_p95_ms_rounds"] = [3 * ttft, 3.5 * ttft, 2.8 * ttft]
        rates = {"rate": 4.2, "hit_rate": found, "host_rate": host, "disk_rate": disk}
        blocks = {"kv_blocks": 140, "working_set": 560}
        made.append({"server": server, **rates, **ttfts, **facts, **blocks, "hardware": "Intel Xeon, 2 cores"})
    return made


def test_the_shares_of_the_tiers_are_drawn_end_to_end() -> None:
    hits, _ = kv_figure(rows()).axes
    ends = [bar.get_x() + bar.get_width() for bar in hits.patches[2::3]]
    assert ends == pytest.approx([100 * row["hit_rate"] for row in rows()])
    assert [bar.get_width() for bar in hits.patches[1::3]] == pytest.approx([100 * row["host_rate"] for row in rows()])


def test_it_says_what_it_shows_and_is_legible() -> None:
    figure = kv_figure(rows())
    said = " ".join(text.get_text() for text in figure.texts)
    for fact in ("32 conversations of 6 turns", "560 KV blocks", "the KV cache has 140", "3 rounds", "Intel Xeon"):
        assert fact in said
    assert_nothing_clipped(figure)
    assert_apart(figure)


def test_the_working_set_is_four_times_the_cache() -> None:
    """And the mean history of what the workload really sends."""
    sizes = Sizes.of(32)
    assert sizes.working_set == 4 * sizes.pool == 560
    sent = workload(32, 32 * 30, 5)
    mean = sum(spec.input_tokens + spec.output_tokens for spec in sent) / len(sent)
    assert 32 * mean / 32 == pytest.approx(sizes.working_set, rel=0.1)
