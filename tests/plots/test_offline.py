"""The figure of offline throughput: bars, labels, ratios, and reports with nothing else in them."""

from pathlib import Path

import pytest

from bench.results import RunFiles, Summary
from plots.compare import failed_conditions
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


def test_the_tables_of_offline_points_have_throughputs_alone(folder: Path) -> None:
    report = write_report([folder])
    for comparison, (off, on) in zip(report.comparisons, ((2.0, 1.9), (2.1, 4.2)), strict=True):
        assert [metric.key for metric in comparison.metrics] == ["offline_rate", "offline_tok_s"]
        cells = [row["offline_rate"] for row in comparison.rows.values()]
        assert [cell.value for cell in cells] == [pytest.approx(off), pytest.approx(on)]
        assert cells[1].difference == pytest.approx(100 * (on / off - 1))
    table = (report.page.parent / "comparison.md").read_text()
    assert "repeat 50%: offline" in table
    assert "caches on / mmmu-pro/8 repeat 50%: 4.2 req/s offline" in table
    page = report.page.read_text()
    assert "all requests were submitted at once" in page
    assert "no answer" not in table + page


def test_conditions_compare_offline_throughputs(folder: Path) -> None:
    results = load([folder])
    assert failed_conditions(results, ["offline_rate<-20%"]) == []
    assert len(failed_conditions(results, ["offline_rate<0%"])) == 1
    assert len(failed_conditions(results, ["itl_p99>5%"])) == 2


def test_results_of_a_server_have_no_offline_figure(demo: Path) -> None:
    assert offline_figure(load([demo])) is None
