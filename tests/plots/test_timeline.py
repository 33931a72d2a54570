import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.results import PointRecord, RunFiles
from plots.data import Series, load
from plots.samples import read_moments
from plots.style import save
from plots.timeline import MOST_DOTS, timeline_figure, timeline_point
from tests.plots.made import ARTICLES, Server, edited
from tests.plots.test_figures import WORKLOAD, assert_apart, assert_nothing_clipped, footer

ON, OFF = "prefix caching on", "prefix caching off"


def series_of(folder: Path, configuration: str = ON) -> Series:
    return load([folder]).series[configuration, WORKLOAD]


def figure_of(folder: Path, point: PointRecord):
    results = load([folder])
    figure = timeline_figure(results, results.series[point.configuration, WORKLOAD], point)
    assert figure is not None
    return figure


def point_of(folder: Path, configuration: str = ON) -> PointRecord:
    point = timeline_point(series_of(folder, configuration))
    assert point is not None
    return point


def test_the_first_rate_that_preempts_is_told_else_the_first_not_sustained_else_the_highest(demo: Path) -> None:
    assert point_of(demo).rate == 5.5
    edited(demo, lambda p: replace(p, preemptions=1 if p.rate == 6.6 else 0))
    assert point_of(demo).rate == 6.6
    edited(demo, lambda p: replace(p, preemptions=None))
    assert point_of(demo).rate == 5.5
    edited(demo, lambda p: replace(p, sustained=True, provisional=False))
    assert point_of(demo).rate == 6.6
    edited(demo, lambda p: replace(p, valid=False))
    assert timeline_point(series_of(demo)) is None


def test_the_server_and_the_requests_in_time(demo: Path) -> None:
    point = point_of(demo)
    figure = figure_of(demo, point)
    requests, cache, first, gaps = figure.axes
    readings = RunFiles(demo).read_metrics(point.point_id)
    assert readings is not None
    lines = {line.get_label(): line for line in requests.lines}
    assert set(lines) == {"open at the client", "running (server)", "waiting (server)"}
    assert max(lines["running (server)"].get_ydata()) == readings["running"].max() == 8
    assert max(lines["waiting (server)"].get_ydata()) == readings["waiting"].max() > 0
    # The made-up server's readings are of the same requests as the client's.
    assert max(lines["open at the client"].get_ydata()) >= (readings["running"] + readings["waiting"]).max()
    assert [text.get_text() for text in cache.get_legend().get_texts()] == ["KV use", "preemptions (3 in total)"]
    assert len(first.lines[0].get_xdata()) == point.requests
    assert len(gaps.lines[0].get_xdata()) == point.requests * 31
    assert "not sustained: the queue grew" in footer(figure)
    assert "metrics were read every 0.5 s" in footer(figure)


def test_open_requests_are_counted_from_sending_to_the_end(demo: Path) -> None:
    point = point_of(demo)
    moments = read_moments(demo, point)
    assert moments is not None
    rows = RunFiles(demo).read_requests(point.point_id)
    assert moments.open_count[-1] == 0
    assert moments.open_count.min() >= 0
    for at in np.linspace(0.013, 12, 17):
        seen = ((rows["sent_s"] <= at) & (rows["intended_s"] + rows["e2e_s"] > at)).sum()
        assert moments.open_count[np.searchsorted(moments.open_s, at, side="right") - 1] == seen
    gaps = np.concatenate([np.asarray(g) for g in rows["chunk_gaps_s"]])
    assert np.sort(moments.gap) == pytest.approx(np.sort(gaps) * 1e3)
    assert moments.gap_end_s.max() == pytest.approx((rows["intended_s"] + rows["e2e_s"]).max())


def test_failures_and_requests_without_a_token_are_marked(demo: Path) -> None:
    files, point = RunFiles(demo), point_of(demo)
    rows = files.read_requests(point.point_id)
    rows.loc[:4, "status"] = "http 429"
    rows.loc[5:11, "status"] = "cut short"
    rows.loc[:11, ["ttft_s", "e2e_s"]] = np.nan
    rows.to_parquet(files.requests_path(point.point_id))
    first = figure_of(demo, point).axes[2]
    assert [t.get_text() for t in first.get_legend().get_texts()] == ["failed (5)", "no token by the end (7)"]
    moments = read_moments(demo, point)
    assert moments is not None
    assert len(moments.sent_s) == point.requests - 12


def test_every_request_failed(demo: Path) -> None:
    files, point = RunFiles(demo), point_of(demo)
    rows = files.read_requests(point.point_id)
    rows["status"] = "connection"
    rows[["ttft_s", "e2e_s"]] = np.nan
    rows.to_parquet(files.requests_path(point.point_id))
    figure = figure_of(demo, point)
    assert all("no tokens" in [t.get_text() for t in axes.texts] for axes in figure.axes[2:])


def test_without_readings_the_clients_view_remains(demo: Path) -> None:
    shutil.rmtree(demo / "metrics")
    figure = figure_of(demo, point_of(demo))
    assert [line.get_label() for line in figure.axes[0].lines] == ["open at the client"]
    assert "the server's metrics were not recorded" in [t.get_text() for t in figure.axes[1].texts]


def test_a_server_without_a_kv_metric(demo: Path) -> None:
    point = point_of(demo)
    path = demo / "metrics" / f"{point.point_id}.parquet"
    frame = pd.read_parquet(path)
    frame[["kv_use", "preemptions"]] = np.nan
    frame.to_parquet(path)
    figure = figure_of(demo, point)
    assert "the server has no KV cache metrics" in [t.get_text() for t in figure.axes[1].texts]


def test_warm_up_and_last_answers_are_set_apart(demo: Path) -> None:
    point = replace(point_of(demo), warmup_s=4.0, window_s=8.0)
    names = [t.get_text() for t in figure_of(demo, point).axes[0].texts]
    assert names == ["warm-up", "window", "drain"]


def test_of_many_gaps_the_slowest_are_always_there(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run("a", servers={ON: Server(20, output=100)}, requests=300)
    files, point = RunFiles(folder), point_of(folder)
    figure = figure_of(folder, point)
    moments = read_moments(folder, point)
    assert moments is not None
    assert len(moments.gap) == 300 * 99 > MOST_DOTS
    shown = figure.axes[3].lines[0].get_ydata()
    assert len(shown) < MOST_DOTS
    assert max(shown) == moments.gap.max()
    assert f"of {len(moments.gap):,} gaps shown" in footer(figure)
    _, svg = save(figure, tmp_path / "a.png")
    assert svg.stat().st_size < 1_500_000
    assert files.read_metrics(point.point_id) is not None


def test_text_is_legible(make_run: Callable[..., Path], demo: Path) -> None:
    results = load([make_run("a", workloads=ARTICLES)])
    for figure in (
        figure_of(demo, point_of(demo, OFF)),
        *(timeline_figure(results, s, p) for s in results.series.values() if (p := timeline_point(s)) is not None),
    ):
        assert figure is not None
        assert_nothing_clipped(figure)
        assert_apart(figure)


def test_no_figure_without_the_request_file(demo: Path) -> None:
    point = point_of(demo)
    RunFiles(demo).requests_path(point.point_id).unlink()
    results = load([demo])
    assert timeline_figure(results, results.series[ON, WORKLOAD], point) is None
    assert timeline_point(results.series[ON, WORKLOAD]) != point
