import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.results import RunFiles
from cli.report import show_report
from plots.data import hardware_lines, load, model_names
from plots.latency import caption
from plots.report import write_report
from plots.simulated import error_text, error_texts
from tests.plots.made import Server

H100 = {
    "hardware": "h100", "title": "NVIDIA H100 SXM 80 GB", "description": "0123456789ab", "engine": "v1",
    "errors": {"tpot": {"median": 0.045, "p90": 0.12, "rows": 300}},
}  # fmt: skip
H200 = H100 | {"hardware": "h200", "title": "NVIDIA H200 SXM 141 GB", "errors": {}}
NOTE = "host costs of V0: read off a figure, not validated"
V0 = H100 | {"engine": "v0", "errors": {}, "note": NOTE}
PAIR = {"v1": Server(4.0), "v0": Server(3.0)}


def marked(folder: Path, **hardware: dict) -> Path:
    files = RunFiles(folder)
    summary = files.read_summary()
    for name, mark in hardware.items():
        summary.configurations[name]["simulated"] = mark
    files.write_summary(summary)
    return folder


@pytest.fixture
def simulated(make_run: Callable[..., Path]) -> Path:
    return marked(make_run("simulated", PAIR), v1=H100, v0=V0)


def test_the_summary_says_that_it_is_simulated(simulated: Path, make_run: Callable[..., Path]) -> None:
    assert json.loads((simulated / "summary.json").read_text())["simulated"] is True
    measured = RunFiles(make_run("measured", PAIR))
    measured.write_summary(measured.read_summary())
    assert json.loads((measured.folder / "summary.json").read_text())["simulated"] is False


def test_titles_and_captions_name_the_simulated_hardware(simulated: Path) -> None:
    results = load([simulated])
    assert results.title.endswith(", simulated NVIDIA H100 SXM 80 GB")
    assert results.heading("500/2000").endswith("simulated NVIDIA H100 SXM 80 GB: 500/2000")
    assert results.configurations == ["v1", "v0"]  # the title says all
    assert hardware_lines(results) == ["simulated NVIDIA H100 SXM 80 GB (description 0123456789ab)"]
    errors = "Errors of simulated latencies on NVIDIA H100 SXM 80 GB"
    known = [f"{errors}, V1 in closed loops: TPOT 4.5% (median), 12% (P90)", f"{errors}, V0: not known; {NOTE}"]
    assert error_texts(results.summaries) == known
    shown = " ".join(" ".join(caption(results, results.workloads[0])).split())
    assert all(text in shown for text in known)


def test_a_simulated_configuration_that_never_ran_does_not_count_as_measured(simulated: Path) -> None:
    files = RunFiles(simulated)
    summary = files.read_summary()
    summary.configurations["v2"] = {"model": "m", "serve": {"device": "sim:h100"}}
    files.write_summary(summary)
    assert "partly" not in load([simulated]).title


def test_simulated_beside_measured_results_are_marked_one_by_one(
    simulated: Path, make_run: Callable[..., Path]
) -> None:
    results = load([make_run("measured", PAIR), simulated])
    assert results.title.endswith(", partly simulated NVIDIA H100 SXM 80 GB")
    assert results.configurations == [
        "measured: v1", "measured: v0", "simulated: v1 (simulated)", "simulated: v0 (simulated)",
    ]  # fmt: skip
    assert results.baselines["simulated: v0 (simulated)"] == "measured: v0"
    assert len(hardware_lines(results)) == 2


def test_several_simulated_devices_are_named_one_by_one(simulated: Path, make_run: Callable[..., Path]) -> None:
    results = load([simulated, marked(make_run("other", PAIR), v1=H200, v0=H200)])
    assert results.title.endswith(", simulated NVIDIA H100 SXM 80 GB and NVIDIA H200 SXM 141 GB")
    assert results.configurations[0] == "simulated: v1 (simulated h100)"
    assert results.configurations[3] == "other: v0 (simulated h200)"
    assert error_texts(results.summaries)[-1].endswith("NVIDIA H200 SXM 141 GB, V1: not known")


def test_page_markdown_and_terminal_carry_the_mark(simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = write_report([simulated])
    page = report.page.read_text()
    assert "simulated NVIDIA H100 SXM 80 GB</h1>" in page
    assert '<p class="facts">Simulated ' in page
    assert "TPOT 4.5%" in page
    assert NOTE in page
    assert "simulated NVIDIA H100 SXM 80 GB" in (simulated / "comparison.md").read_text().splitlines()[0]
    show_report((simulated,), None)
    shown = " ".join(capsys.readouterr().out.split())
    assert "simulated NVIDIA H100 SXM 80 GB" in shown
    assert NOTE in shown


def test_results_of_earlier_versions_name_no_engine_and_no_kind_of_load() -> None:
    mark = {"title": "NVIDIA H100", "errors": {"ttft": {"median": 0.4, "p90": 1.6, "rows": 300}}}
    assert error_text(mark) == "Errors of simulated latencies on NVIDIA H100: TTFT 40.0% (median), 160% (P90)"


MODELS = {"500/2000": "org/small", "2048/128": "org/large"}


@pytest.fixture
def of_models(make_run: Callable[..., Path]) -> Path:
    """A sweep whose workloads have models of their own; one configuration is measured on one of them only."""
    folder = make_run("models", PAIR | {"extra": Server(5.0)}, {"500/2000": 1.0, "2048/128": 0.5})
    files = RunFiles(folder)
    summary = files.read_summary()
    for name, model in MODELS.items():
        summary.workloads[name]["model"] = model
    summary.answers = [a for a in summary.answers if (a.configuration, a.workload) != ("extra", "500/2000")]
    files.write_summary(summary)
    files.write_points([p for p in files.read_points() if (p.configuration, p.workload) != ("extra", "500/2000")])
    return folder


def test_each_model_of_a_sweep_has_its_own_throughput_figure(of_models: Path) -> None:
    report = write_report([of_models])
    assert {path.name for path in report.files if path.name.startswith("throughput") and path.suffix == ".png"} == {
        "throughput-org-small.png", "throughput-org-large.png",
    }  # fmt: skip
    results = load([of_models])
    small = results.narrowed(["500/2000"])
    assert (small.configurations, small.workloads) == (["v1", "v0"], ["500/2000"])
    assert model_names(small) == ["org/small"]
    assert model_names(results) == ["org/small", "org/large"]
    assert "Model: org/small" in "  ".join(caption(small, "500/2000"))


def test_results_without_models_of_workloads_stay_whole(simulated: Path) -> None:
    results = load([simulated])
    assert results.narrowed(results.workloads[:1]) is results
