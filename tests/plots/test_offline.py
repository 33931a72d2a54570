"""The figure of offline throughput: bars, labels, ratios, and reports with nothing else in them."""

from pathlib import Path

import pytest

from bench.results import RunFiles, Summary
from plots.data import load
from plots.offline import offline_figure
from plots.report import write_report
from tests.plots.made import Server, make_point
from tests.plots.test_figures import assert_apart, assert_nothing_clipped, shown_texts

RATES = {("caches off", 0): 2.0, ("caches on", 0): 1.9, ("caches off", 50): 2.1, ("caches on", 50): 4.2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = RunFiles(tmp_path / "offline")
    names = {share: f"mmmu-pro/8 repeat {share}%" for share in (0, 50)}
    files.write_summary(
        Summary(
            "tiny offline", 0, {"caches off": {"model": "tiny"}, "caches on": {"model": "tiny"}},
            {name: {"kind": "mmmu-pro", "repeat": share} for share, name in names.items()},
        )
    )  # fmt: skip
    for (configuration, share), rate in RATES.items():
        point, rows = make_point(Server(10), configuration, names[share], rate, "offline", 20)
        point.sustained = None
        files.add_point(point, rows)
    return files.folder


def test_bars_are_grouped_by_share_with_ratios_to_the_first_configuration(folder: Path) -> None:
    figure = offline_figure(load([folder]))
    assert figure is not None
    texts = [text.get_text() for text in shown_texts(figure)]
    assert {"0%", "50%", "0.95 ×", "2.00 ×"} <= set(texts)
    heights = sorted(bar.get_height() for bar in figure.axes[0].patches)
    assert heights == pytest.approx(sorted(RATES.values()))
    assert_nothing_clipped(figure)
    assert_apart(figure)


def test_a_report_of_offline_points_only(folder: Path) -> None:
    report = write_report([folder])
    assert {path.name for path in report.files if path.suffix == ".png"} == {"offline.png"}
    assert "offline.png" in report.page.read_text() or "data:image" in report.page.read_text()


def test_results_of_a_server_have_no_offline_figure(demo: Path) -> None:
    assert offline_figure(load([demo])) is None
