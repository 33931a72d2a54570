import base64
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from bench.results import PointRecord, RunFiles, Summary
from plots.compare import compare
from plots.data import ReportError, load
from plots.report import Report, slug, write_report
from plots.tables import markdown
from tests.plots.made import ARTICLES, DEMO, TWO, Server, edited

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Parses strictly enough to find unclosed tags, and collects what the tests look at."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.keys: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [v for k, v in attrs if k == "href" and v]
        self.sources += [v for k, v in attrs if k == "src" and v]
        self.keys += [v or "" for k, v in attrs if k == "data-value"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        assert "onclick" not in values

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"script", "style"} & set(self.open):
            return
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data.strip()


@pytest.fixture(scope="module")
def demo_report(templates: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of the demo's measurements, for the tests that change nothing."""
    return write_report([shutil.copytree(templates(TWO, DEMO), tmp_path_factory.mktemp("report") / "demo")])


def test_a_report_is_made_of_files_in_the_folder(demo_report: Report) -> None:
    report, demo = demo_report, demo_report.page.parent
    names = {path.name for path in report.files}
    assert names == {
        "latency-shared-prefix-448-64-32.png",
        "latency-shared-prefix-448-64-32.svg",
        "throughput.png",
        "throughput.svg",
        "percentiles-shared-prefix-448-64-32.png",
        "percentiles-shared-prefix-448-64-32.svg",
        "timeline-prefix-caching-on-shared-prefix-448-64-32-ladder-5.5.png",
        "timeline-prefix-caching-on-shared-prefix-448-64-32-ladder-5.5.svg",
        "timeline-prefix-caching-off-shared-prefix-448-64-32-ladder-2.2.png",
        "timeline-prefix-caching-off-shared-prefix-448-64-32-ladder-2.2.svg",
        "comparison.md",
        "report.html",
    }
    assert all(path.parent == demo and path.stat().st_size > 500 for path in report.files)
    assert report.page == demo / "report.html"


def test_the_page_is_self_contained_and_whole(make_run: Callable[..., Path]) -> None:
    folder = make_run("a", workloads=ARTICLES)
    page = Page(write_report([folder]).page.read_text())
    assert not page.links
    assert len(page.sources) == 2 * len(ARTICLES) + 1 + len(ARTICLES) * len(TWO)
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(BytesIO(base64.b64decode(data))).width == 2000
    points = RunFiles(folder).read_points()
    comparisons, load_points = page.tables[: len(ARTICLES)], page.tables[len(ARTICLES)]
    assert all(len(table) == 1 + len(TWO) for table in comparisons)
    assert len(load_points) == 1 + len(points)
    assert {len(row) for row in load_points} == {len(load_points[0])}
    said = " ".join(page.words)
    for fact in ("Three" if "Three" in said else "Prefix caching on and off", "4.22", "binding: compute", "Intel Xeon"):
        assert fact in said
    assert "max-num-seqs" in said
    assert "torch version" in said


def test_nothing_is_fetched_from_elsewhere(demo_report: Report) -> None:
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", demo_report.page.read_text())
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)


def test_sort_keys_are_plain_numbers(demo_report: Report) -> None:
    page = Page(demo_report.page.read_text())
    numeric = [key for key in page.keys if key and key[0].isdigit() and not key.endswith("/32")]
    assert len(numeric) > 50
    assert all(float(key) >= 0 for key in numeric)


def test_names_are_escaped(make_run: Callable[..., Path]) -> None:
    folder = make_run("a", servers={"<script>alert(1)</script>": Server(4), "a & b | c": Server(3)})
    shutil.rmtree(folder / "requests")
    report = write_report([folder])
    page = Page(report.page.read_text())
    assert "<script>alert" not in report.page.read_text()
    assert any("<script>alert(1)</script>" in word for word in page.words)
    assert "a & b \\| c" in (folder / "comparison.md").read_text()


def test_markdown_tables_have_as_many_cells_in_every_row(make_run: Callable[..., Path]) -> None:
    results = load([make_run("a", workloads=ARTICLES)])
    text = markdown(results, compare(results))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == len(ARTICLES) * (2 + 8)
    assert {row.count("|") for row in rows} == {len(TWO) + 2}
    assert "1.82 (−57 %)" in text


def test_several_folders_become_one_report_beside_the_last(make_run: Callable[..., Path]) -> None:
    a, b = make_run("results/a"), make_run("results/b")
    for folder in (a, b):
        shutil.rmtree(folder / "requests")
    before = {path.name for path in a.iterdir()}
    report = write_report([a, b])
    assert report.page == a.parent / "compare-a-b" / "report.html"
    assert {path.name for path in a.iterdir()} == before
    assert "b: prefix caching off" in report.page.read_text()


@pytest.fixture
def points_only(demo: Path) -> Path:
    """Without the requests of each load point, which two of the figures are drawn from."""
    shutil.rmtree(demo / "requests")
    return demo


def test_failures_are_shown(points_only: Path) -> None:
    demo = points_only
    files = RunFiles(demo)
    summary = files.read_summary()
    summary.failures["v0 / 500/2000"] = "the server did not start: unknown flag"
    files.write_summary(summary)
    report = write_report([demo])
    assert "the server did not start: unknown flag" in report.page.read_text()
    assert "the server did not start: unknown flag" in (demo / "comparison.md").read_text()


def test_a_run_cut_off_before_its_answer_is_still_drawn(points_only: Path) -> None:
    demo = points_only
    files = RunFiles(demo)
    summary = files.read_summary()
    summary.answers, summary.finished = [], None
    files.write_summary(summary)
    report = write_report([demo])
    assert "no answer" in report.page.read_text()
    assert not (demo / "throughput.png").exists()


def test_nothing_measured(tmp_path: Path) -> None:
    files = RunFiles(tmp_path / "empty")
    files.write_summary(Summary("Empty", 1, {"v1": {}}, {}, failures={"v1 / 500/2000": "out of memory"}))
    with pytest.raises(ReportError, match=r"no load point was measured \(v1 / 500/2000: out of memory\)"):
        write_report([tmp_path / "empty"])


def test_workloads_whose_names_make_the_same_file_name(make_run: Callable[..., Path]) -> None:
    folder = make_run("a", workloads={"500/2000": 1.0, "500 2000": 0.5})
    shutil.rmtree(folder / "requests")
    names = {path.name for path in write_report([folder]).files}
    assert {"latency-500-2000.png", "latency-500-2000-2.png"} <= names


def test_file_names_of_workloads() -> None:
    assert [slug(name) for name in ("500/2000", *DEMO, "…")] == ["500-2000", "shared-prefix-448-64-32", "workload"]


def test_what_is_no_clean_measurement_is_listed(points_only: Path) -> None:
    demo = points_only

    def spoil(p: PointRecord) -> PointRecord:
        if p.phase == "confirm":
            return replace(p, valid=False, sustained=None, reason="the generator was the bottleneck: CPU share 97 %")
        if p.phase == "search":
            return replace(p, failed=15, failures="connection:3;http 429:12", goodput=1.5)
        return replace(p, disturbed=True, others_cpu_share=0.25, steal_share=0.125) if p.phase == "ladder" else p

    edited(demo, spoil)
    report = write_report([demo])
    page = Page(report.page.read_text())
    said = " ".join(page.words)
    assert said.count("invalid: the generator was the bottleneck: CPU share 97 %") == 2
    assert said.count("failed requests: 12 × http 429, 3 × connection") == 4
    ladder = sum(p.phase == "ladder" for p in RunFiles(demo).read_points())
    words = "valid; disturbed: other processes used 25% of the cores and the hypervisor took 12%"
    assert said.count(words) == ladder > 0
    heads = page.tables[1][0]
    others, steal = (next(i for i, h in enumerate(heads) if h.startswith(name)) for name in ("Others' CPU", "Steal"))
    assert {(row[others], row[steal]) for row in page.tables[1][1:]} == {("0.25", "0.125"), ("–", "–")}
    (goodput, failed) = (next(i for i, h in enumerate(heads) if h.startswith(name)) for name in ("Goodput", "Failed"))
    assert {row[goodput] for row in page.tables[1][1:]} == {"1.5", "–"}
    assert sum(row[failed] == "15 (12 × http 429, 3 × connection)" for row in page.tables[1][1:]) == 4
    lines = [line for line in (demo / "comparison.md").read_text().splitlines() if "429" in line or "97 %" in line]
    assert len(lines) == 6


def test_clean_measurements_have_no_such_list(demo_report: Report) -> None:
    text = demo_report.page.read_text()
    assert "disturbed load points" not in text
    assert "Goodput" not in text


def test_a_timeline_that_was_asked_for_is_drawn_too(demo: Path) -> None:
    name = "prefix_caching_off-shared-prefix_448+64_32-ladder-1.1"
    report = write_report([demo], timelines=[name])
    assert "timeline-prefix-caching-off-shared-prefix-448-64-32-ladder-1.1.png" in {p.name for p in report.files}
    with pytest.raises(ReportError, match=r"no load point 'ladder-1\.1' \(--timeline\); known: .*ladder"):
        write_report([demo], timelines=["ladder-1.1"])


def test_folders_without_their_request_files_are_still_drawn(points_only: Path) -> None:
    names = {path.name for path in write_report([points_only]).files if path.suffix == ".png"}
    assert names == {"latency-shared-prefix-448-64-32.png", "throughput.png"}


def test_what_the_server_resolved_is_shown_apart(points_only: Path) -> None:
    demo = points_only
    files = RunFiles(demo)
    summary = files.read_summary()
    for details in summary.configurations.values():
        details["serve"] = ["smollm2-135m", "--max-num-seqs", "16"]
        details["resolved"] = {
            "500/2000": {"block_size": "32", "max_model_len": 2750},
            "2048/128": {"block_size": "32", "max_model_len": 2393},
        }
    files.write_summary(summary)
    page = Page(write_report([demo]).page.read_text())
    cells = [row for table in page.tables for row in table]
    assert cells.count(["block_size", "32"]) == 2
    assert cells.count(["max_model_len", "2750 (500/2000), 2393 (2048/128)"]) == 2
    assert cells.count(["serve", "smollm2-135m --max-num-seqs 16"]) == 2
