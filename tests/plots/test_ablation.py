import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from bench.results import REQUESTS_FOLDER, RunFiles
from plots.ablation import Ablation, ablation_figure, ablations
from plots.data import Results, load
from plots.report import write_report
from plots.tables import markdown
from tests.plots.made import Server, assert_close, edited
from tests.plots.test_figures import assert_apart, assert_nothing_clipped

SERVERS = {
    "v1": Server(5.0),
    "no-chunking": Server(4.9, itl_ms=36.0),
    "watermark": Server(5.0),
    "v0": Server(3.0, 120, 45.0),
}
SERVE = {
    "v1": {"max-num-seqs": 16},
    "no-chunking": {"ablate": "no-chunking"},
    "watermark": {"ablate": ["watermark"]},
    "v0": {"engine": "v0"},
}
NOTES = {"no-chunking": "a prompt is computed whole in one step", "v0": "all of these | taken away"}


@pytest.fixture
def folder(make_run: Callable[..., Path]) -> Path:
    folder = make_run("ablation", servers=SERVERS, workloads={"256/16": 1.0}, title="What each part is worth")
    files = RunFiles(folder)
    summary = files.read_summary()
    for name, details in summary.configurations.items():
        details["serve"] = SERVE[name]
        if name in NOTES:
            details["note"] = NOTES[name]
    files.write_summary(summary)
    return folder


def only(results: Results) -> Ablation:
    (ablation,) = ablations(results)
    return ablation


def test_rows_are_compared_with_the_whole_engine_at_one_rate(folder: Path) -> None:
    results = load([folder])
    ablation = only(results)
    assert [row.configuration for row in ablation.rows] == list(SERVERS)
    assert [row.note for row in ablation.rows] == ["", NOTES["no-chunking"], "", NOTES["v0"]]
    assert ablation.at == "at 2.5 req/s"  # 0.5 of the best capacity: the highest of the ladder that v0 sustains
    points = {p.configuration: p for p in RunFiles(folder).read_points() if p.phase == "ladder" and p.rate == 2.5}
    whole, without = ablation.rows[0].cells, ablation.rows[1].cells
    assert whole["itl_p99"].difference is None
    assert_close(without["itl_p99"].value, points["no-chunking"].itl_p99_ms)
    wanted = 100 * (points["no-chunking"].itl_p99_ms / points["v1"].itl_p99_ms - 1)
    assert_close(without["itl_p99"].difference, wanted)
    assert_close(ablation.rows[3].cells["rate"].difference, -40.0)


def test_only_differences_beyond_the_intervals_are_clear(folder: Path) -> None:
    whole, chunking, watermark, v0 = (row.cells for row in only(load([folder])).rows)
    assert chunking["itl_p99"].clear
    assert v0["rate"].clear
    assert not any(cell.clear for cell in (*whole.values(), *watermark.values(), chunking["rate"]))


def test_rounds_are_compared_each_with_its_own(folder: Path) -> None:
    """A machine whose speed drifts between rounds moves all configurations alike."""
    files = RunFiles(folder)
    drift = (1.0, 2.5, 0.6, 1.4, 1.9)
    for point in [p for p in files.read_points() if p.phase == "ladder"]:
        for turn, slow in enumerate(drift[1:], start=1):
            more = replace(point, repeat=turn, point_id=f"{point.point_id}-{turn}", itl_p99_ms=slow * point.itl_p99_ms)
            files.add_point(more, [])
            requests = folder / REQUESTS_FOLDER
            shutil.copy(requests / f"{point.point_id}.parquet", requests / f"{more.point_id}.parquet")
    ablation = only(load([folder]))
    whole, chunking, _, _ = (row.cells["itl_p99"] for row in ablation.rows)
    assert len(ablation.points) == len(drift) * len(SERVERS)
    points = {p.configuration: p for p in files.read_points() if p.phase == "ladder" and p.rate == 2.5 and not p.repeat}
    assert_close(whole.value, 1.4 * points["v1"].itl_p99_ms, 1e-3)
    assert_close(whole.low, 0.6 * points["v1"].itl_p99_ms, 1e-3)
    assert_close(whole.high, 2.5 * points["v1"].itl_p99_ms, 1e-3)
    assert chunking.low < whole.high, "the drift is larger than the difference"
    assert chunking.clear
    wanted = 100 * (points["no-chunking"].itl_p99_ms / points["v1"].itl_p99_ms - 1)
    assert_close(chunking.difference, wanted, 1e-3)
    assert not whole.clear
    figure = ablation_figure(load([folder]), ablation)
    assert_nothing_clipped(figure)


@pytest.fixture
def flooded(folder: Path) -> Path:
    """Only the first was searched; all were measured three times on its ladder, up to a rate that none sustains."""
    files = RunFiles(folder)
    summary = files.read_summary()
    summary.answers = [a for a in summary.answers if a.configuration == "v1"]
    files.write_summary(summary)
    kept = [p for p in files.read_points() if p.configuration == "v1" or p.phase == "ladder"]
    kept = [p for p in kept if p.phase != "ladder" or p.rate in (2.5, 7.5)]
    drift = (1.0, 0.8, 1.3)
    rounds = []
    for point in kept:
        for turn, fast in enumerate(drift if point.phase == "ladder" else (1.0,)):
            name = f"{point.point_id}-{turn}" if turn else point.point_id
            rounds.append(replace(point, repeat=turn, point_id=name, achieved_rate=fast * point.achieved_rate))
            if turn:
                requests = folder / REQUESTS_FOLDER
                shutil.copy(requests / f"{point.point_id}.parquet", requests / f"{name}.parquet")
    files.write_points(rounds)
    return folder


def test_what_is_served_of_too_much_stands_for_rates_that_were_not_searched(flooded: Path) -> None:
    ablation = only(load([flooded]))
    assert [metric.key for metric in ablation.columns] == ["served", "itl_p99", "ttft_p99"]
    assert ablation.columns[0].label == "Completed rate at 7.5 req/s"
    assert ablation.at == "at 2.5 req/s"
    whole, chunking, _, v0 = (row.cells["served"] for row in ablation.rows)
    assert_close(whole.value, 5.0)
    assert_close(whole.low, 4.0)
    assert_close(whole.high, 6.5)
    assert_close(v0.difference, -40.0)
    assert v0.clear, "though its rounds and those of the whole overlap"
    assert v0.high > whole.low - 0.2
    assert_close(chunking.difference, -2.0)
    figure = ablation_figure(load([flooded]), ablation)
    assert_nothing_clipped(figure)
    assert_apart(figure)
    words = " ".join(text.get_text() for text in figure.texts)
    assert "Completed rate at 7.5 req/s: no configuration sustains this rate" in words
    assert "| Completed rate at 7.5 req/s, req/s |" in markdown(load([flooded]), [])


def test_one_that_serves_nothing_of_too_much_is_drawn_at_zero(flooded: Path) -> None:
    edited(flooded, lambda p: replace(p, achieved_rate=0.0) if p.configuration == "v0" and p.rate == 7.5 else p)
    edited(flooded, lambda p: replace(p, achieved_rate=0.1) if p.configuration == "watermark" and p.rate == 7.5 else p)
    ablation = only(load([flooded]))
    cell = ablation.rows[3].cells["served"]
    assert (cell.value, cell.difference, cell.clear) == (0.0, -100.0, True)
    assert_nothing_clipped(ablation_figure(load([flooded]), ablation))


def test_a_rate_that_one_sustains_says_nothing_of_what_it_can_take(flooded: Path) -> None:
    edited(flooded, lambda p: replace(p, sustained=True) if p.configuration == "v1" else p)
    assert [metric.key for metric in only(load([flooded])).columns] == ["rate", "itl_p99", "ttft_p99"]


def test_an_interval_without_an_end_is_never_clear(folder: Path) -> None:
    files = RunFiles(folder)
    summary = files.read_summary()
    summary.answers[3].high = None
    summary.answers[2].rate = None
    files.write_summary(summary)
    edited(folder, lambda p: replace(p, itl_p99_ms=float("nan")) if p.configuration == "v0" else p)
    rows = only(load([folder])).rows
    assert not rows[3].cells["rate"].clear
    assert rows[2].cells["rate"].value is None
    assert rows[3].cells["itl_p99"].value is None
    assert rows[3].cells["itl_p99"].difference is None


def test_other_sweeps_have_none(demo: Path, folder: Path) -> None:
    assert ablations(load([demo])) == []
    files = RunFiles(folder)
    summary = files.read_summary()
    summary.configurations["v1"]["serve"] = {"ablate": "full-state"}
    files.write_summary(summary)
    assert ablations(load([folder])) == [], "nothing whole to compare with"


def test_the_figure_has_a_dot_and_words_for_each(folder: Path) -> None:
    results = load([folder])
    figure = ablation_figure(results, only(results))
    for axes in figure.axes:
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert [line.get_ydata()[0] for line in dots] == [0, 1, 2, 3]
        assert sum(line.get_linestyle() == "--" for line in axes.lines) == 1
        assert all(to_hex(line.get_markerfacecolor()) != "#ffffff" for line in dots)
    said = {t.get_text(): t for axes in figure.axes for t in axes.texts}
    assert "−40 %" in said
    assert said["−40 %"].get_weight() == "bold"
    assert {*SERVERS, *NOTES.values()} <= said.keys()
    footer = " ".join(text.get_text() for text in figure.texts)
    for fact in ("P99 latencies at 2.5 req/s", "Dashed: v1", "80 requests each", "Intel Xeon"):
        assert fact in footer
    assert "Hollow" not in footer


def test_what_is_not_sustained_is_hollow(folder: Path) -> None:
    edited(folder, lambda p: replace(p, sustained=False) if p.configuration == "v0" else p)
    results = load([folder])
    figure = ablation_figure(results, only(results))
    hollow = [
        line for axes in figure.axes for line in axes.lines
        if line.get_marker() == "o" and to_hex(line.get_markerfacecolor()) == "#ffffff"
    ]  # fmt: skip
    assert len(hollow) == 2
    assert "Hollow" in " ".join(text.get_text() for text in figure.texts)


def test_text_is_legible_also_on_a_log_axis(folder: Path) -> None:
    for factor in (1, 40):
        edited(
            folder,
            lambda p, f=factor: replace(p, ttft_p99_ms=p.ttft_p99_ms * f) if p.configuration == "v0" else p,
        )  # fmt: skip
        results = load([folder])
        figure = ablation_figure(results, only(results))
        assert figure.axes[2].get_xscale() == ("linear" if factor == 1 else "log")
        assert_nothing_clipped(figure)
        assert_apart(figure)


def test_it_is_in_the_report_and_in_markdown(folder: Path) -> None:
    report = write_report([folder])
    assert {"ablation-256-16.png", "ablation-256-16.svg"} <= {path.name for path in report.files}
    page = report.page.read_text()
    assert "256/16: one part switched off at a time, latencies at 2.5 req/s" in page
    assert NOTES["no-chunking"] in page
    assert 'class="difference clear">−40 %' in page
    text = markdown(report.results, report.comparisons)
    row = next(line for line in text.splitlines() if line.startswith("| v0: all"))
    assert row.startswith("| v0: all of these \\| taken away | 2.88 **−40 %** |")
    assert row.count("|") - row.count("\\|") == 5
    plain_row = next(line for line in text.splitlines() if line.startswith("| watermark"))
    assert "**" not in plain_row
