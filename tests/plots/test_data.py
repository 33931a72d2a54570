import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.results import RunFiles
from plots.data import ReportError, Series, load, newest
from tests.plots.made import TWO, edited


def only(folder: Path, configuration: str = "prefix caching on") -> Series:
    return load([folder]).series[configuration, "shared-prefix 448+64/32"]


def test_configurations_and_workloads_keep_their_order(make_run: Callable[..., Path]) -> None:
    results = load([make_run("a", workloads={"500/2000": 1.0, "2048/128": 0.5})])
    assert results.configurations == list(TWO)
    assert results.workloads == ["500/2000", "2048/128"]
    assert {s.configuration for s in results.of_workload("2048/128")} == set(TWO)


def test_colliding_configurations_carry_their_folder(make_run: Callable[..., Path]) -> None:
    a = make_run("a")
    b = make_run("b", servers={"prefix caching on": TWO["prefix caching on"], "fresh": TWO["prefix caching off"]})
    results = load([a, b])
    assert results.configurations == [
        "a: prefix caching on",
        "prefix caching off",
        "b: prefix caching on",
        "fresh",
    ]
    assert results.baselines["b: prefix caching on"] == "a: prefix caching on"
    assert results.baselines["fresh"] == "a: prefix caching on"
    assert results.candidates == ["b: prefix caching on", "fresh"]
    assert results.details("fresh")["model"] == "smollm2-135m"


def test_folders_of_one_name_are_told_apart(make_run: Callable[..., Path]) -> None:
    results = load([make_run("monday/demo"), make_run("tuesday/demo")])
    assert "monday/demo: prefix caching on" in results.configurations


def test_the_curve_is_the_ladder_and_the_confirmed_rate(demo: Path) -> None:
    series = only(demo)
    assert {d.point.phase for d in series.curve} == {"ladder", "confirm"}
    rates = [d.point.rate for d in series.curve]
    assert rates == sorted(rates)
    assert {d.requests for d in series.curve} == {80}
    assert {d.gaps for d in series.curve} == {80 * 31}


def test_without_a_ladder_the_search_is_drawn(demo: Path) -> None:
    files = RunFiles(demo)
    files.write_points([p for p in files.read_points() if p.phase != "ladder"])
    assert {d.point.phase for d in only(demo).curve} == {"search", "confirm"}


def test_invalid_and_unjudged_points_are_left_out_and_counted(demo: Path) -> None:
    def spoil(point):
        return replace(point, valid=False, sustained=None) if point.phase == "confirm" else point

    edited(demo, spoil)
    series = only(demo)
    assert series.invalid == 1
    assert {d.point.phase for d in series.curve} == {"ladder"}


def test_one_point_stands_for_a_rate_measured_twice(demo: Path) -> None:
    def crowd(point):
        return replace(point, rate=4.0, requests=point.requests + 5 * (point.phase == "confirm"))

    edited(demo, crowd)
    curve = only(demo).curve
    assert len(curve) == 1
    assert curve[0].point.phase == "confirm"


def test_samples_are_estimated_where_the_request_files_are_missing(demo: Path) -> None:
    shutil.rmtree(demo / "requests")
    curve = only(demo).curve
    assert {d.requests for d in curve} == {80}
    sustained = [d.gaps for d in curve if d.point.sustained]
    assert all(abs(gaps - 80 * 31) <= 1 for gaps in sustained)


def test_the_newest_results_are_those_written_last(make_run: Callable[..., Path], tmp_path: Path) -> None:
    old, new = make_run("results/old"), make_run("results/new")
    for path in old.iterdir():
        os.utime(path, (1_000_000, 1_000_000))
    (tmp_path / "results" / "bench-core.json").write_text("[]")
    assert newest(tmp_path / "results") == new


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: None, "has no summary.json"),
        (lambda folder: (folder / "summary.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "summary.json").write_text('{"answers": [], "future": 1}'), "cannot be read"),
    ],
)
def test_what_is_no_results_folder_is_named(tmp_path: Path, prepare: Callable[[Path], object], said: str) -> None:
    prepare(tmp_path)
    with pytest.raises(ReportError, match=said):
        load([tmp_path])


def test_no_results_at_all(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="redline sweep --preset demo"):
        newest(tmp_path / "results")


def test_a_folder_given_twice(demo: Path) -> None:
    with pytest.raises(ReportError, match="passed twice"):
        load([demo, demo])


def test_files_of_before_steps_were_counted_get_intervals_that_respect_them(make_run: Callable[..., Path]) -> None:
    folder = make_run("a")
    edited(folder, lambda p: replace(p, itl_steps=0, ttft_p99_high_ms=p.ttft_p99_ms))
    series = next(iter(load([folder]).series.values()))
    for drawn in series.curve:
        assert 0 < drawn.steps == drawn.point.itl_steps <= drawn.gaps
        assert drawn.point.itl_p99_low_ms <= drawn.point.itl_p99_ms <= drawn.point.itl_p99_high_ms
        assert drawn.point.ttft_p99_high_ms == math.inf, "80 requests have no upper end of a P99"
        assert series.rounds(drawn.point)[0].itl_steps > 0
    for path in (folder / "requests").iterdir():
        path.unlink()
    for drawn in next(iter(load([folder]).series.values())).curve:
        assert (drawn.point.itl_p99_low_ms, drawn.point.itl_p99_high_ms) == (-math.inf, math.inf)
