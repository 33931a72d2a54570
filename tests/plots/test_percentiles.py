from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.results import RunFiles
from plots.compare import points_at_one_rate
from plots.data import load
from plots.percentiles import curve, percentile_figure, stretch
from plots.samples import read_samples
from plots.style import COLORS, save
from tests.plots.made import TWO, Server
from tests.plots.test_figures import WORKLOAD, assert_apart, assert_nothing_clipped, footer


@given(st.lists(st.floats(0.1, 1e5), min_size=1, max_size=4000), st.integers(0, 50))
def test_a_curve_is_the_distribution_of_its_samples(values: list[float], unanswered: int) -> None:
    samples = np.sort(np.array([*values, *[np.inf] * unanswered]))
    shown, shares = curve(samples)
    assert np.all(np.diff(shown) >= 0)
    assert np.all(np.diff(shares) > 0)
    assert shown[-1] == max(values)
    for value, share in zip(shown[:50], shares[:50], strict=True):
        at = round(share * len(samples))
        assert samples[at] == value
    assert shares[-1] == pytest.approx((len(values) - 1) / len(samples))


def test_thinning_keeps_the_tail() -> None:
    shown, shares = curve(np.arange(300_000.0))
    assert len(shown) <= 1500
    assert list(shown[-5:]) == [299_995, 299_996, 299_997, 299_998, 299_999]
    for share in (0.5, 0.9, 0.99, 0.999):
        assert np.interp(share, shares, shown) == pytest.approx(300_000 * share, rel=0.002)


def test_nines() -> None:
    assert stretch(np.array([0.0, 0.9, 0.99, 0.999])) == pytest.approx([0, 1, 2, 3])


def test_the_samples_are_those_of_the_point(demo: Path) -> None:
    (series, _) = load([demo]).of_workload(WORKLOAD)
    for drawn in series.curve:
        samples = read_samples(demo, drawn.point)
        assert samples is not None
        assert (len(samples.ttft), len(samples.itl)) == (drawn.requests, drawn.gaps)
        # points.csv keeps six digits
        assert np.quantile(samples.itl, 0.99) == pytest.approx(drawn.point.itl_p99_ms, rel=1e-5)
        assert np.median(samples.ttft) == pytest.approx(drawn.point.ttft_p50_ms, rel=1e-5)


def test_all_configurations_are_shown_at_one_rate(demo: Path) -> None:
    results = load([demo])
    chosen, words = points_at_one_rate(results.of_workload(WORKLOAD))
    assert words == "at 1.1 req/s"
    assert {p.rate for _, p in chosen} == {1.1}
    figure = percentile_figure(results, WORKLOAD)
    assert figure is not None
    assert figure.texts[0].get_text().endswith(f"{WORKLOAD}, at 1.1 req/s")
    for axes in figure.axes:
        solid = [line for line in axes.lines if line.get_linestyle() == "-"]
        assert [line.get_color() for line in solid] == list(COLORS[:2])
        dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert len(dotted) == 2
    assert "80 requests, 2,480 inter-token gaps" in footer(figure)
    point = chosen[0][1]
    assert (
        f"ITL P50 {point.itl_p50_ms:.3g}, P99 {point.itl_p99_ms:.3g} ms" in figure.legends[0].get_texts()[0].get_text()
    )


def test_without_a_common_rate_the_legend_says_each(make_run: Callable[..., Path]) -> None:
    other = {name: Server(s.capacity * 0.91) for name, s in TWO.items()}
    results = load([make_run("a"), make_run("b", servers=other)])
    figure = percentile_figure(results, WORKLOAD)
    assert figure is not None
    assert "at the measured rates nearest to 1.66 req/s" in figure.texts[0].get_text()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "1.82 req/s: " in labels[1]
    assert "1.66 req/s: " in labels[3]
    assert_nothing_clipped(figure)


def test_requests_without_a_token_keep_the_curve_from_its_end(demo: Path) -> None:
    files = RunFiles(demo)
    points = [p for p in files.read_points() if p.rate == 1.1]
    for point in points:
        rows = files.read_requests(point.point_id)
        rows.loc[:39, ["ttft_s", "e2e_s"]] = np.nan
        rows.loc[:39, "status"] = "cut short"
        rows.to_parquet(files.requests_path(point.point_id))
    samples = read_samples(demo, points[0])
    assert samples is not None
    assert np.isinf(samples.ttft).sum() == 40
    figure = percentile_figure(load([demo]), WORKLOAD)
    assert figure is not None
    ttft = figure.axes[1]
    assert (
        max(max(line.get_ydata()) for line in ttft.lines if line.get_linestyle() in "-:" and line.get_color() in COLORS)
        < 0.31
    )
    assert "had no first token" in footer(figure)


def test_no_figure_without_request_files(demo: Path) -> None:
    for path in (demo / "requests").iterdir():
        path.unlink()
    assert percentile_figure(load([demo]), WORKLOAD) is None


def test_text_is_legible(make_run: Callable[..., Path], demo: Path, tmp_path: Path) -> None:
    servers = {f"v1 with option {letter}": Server(3 + i, 60 + 5 * i) for i, letter in enumerate("ABC")}
    three = load([make_run("a", servers=servers, workloads={"500/2000": 1.0, "6000/4000": 0.25})])
    for results in (load([demo]), three, load([make_run("b", requests=1100)])):
        for workload in results.workloads:
            figure = percentile_figure(results, workload)
            assert figure is not None
            assert_nothing_clipped(figure)
            assert_apart(figure)
    _, first = save(figure, tmp_path / "one.png")
    assert first.stat().st_size > 1000


def test_invalid_points_are_not_chosen(demo: Path) -> None:
    files = RunFiles(demo)
    files.write_points([replace(p, valid=p.rate != 1.1) for p in files.read_points()])
    chosen, _ = points_at_one_rate(load([demo]).of_workload(WORKLOAD))
    assert all(p.rate != 1.1 for _, p in chosen)
