import shutil
from pathlib import Path

import pytest

from bench.results import RunFiles
from cli.main import main
from tests.plots.made import DEMO, TWO, Server, write_run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Without the requests of each load point, which most of the figures are drawn from."""
    folder = write_run(tmp_path / "results" / "demo", TWO, DEMO)
    shutil.rmtree(folder / "requests")
    return folder


@pytest.mark.usefixtures("demo")
def test_bare_it_takes_the_newest_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 0
    said = capsys.readouterr().out
    assert said.rstrip().splitlines()[-1] == "report: results/demo/report.html"
    assert "1.82 −57 %" in said
    assert "prefix caching on / shared-prefix 448+64/32: sustains 4.22 req/s (3.93–4.56, provisional)" in said


def test_out_takes_the_files(demo: Path, tmp_path: Path) -> None:
    assert main(["report", str(demo), "--out", "elsewhere"]) == 0
    assert (tmp_path / "elsewhere" / "report.html").exists()
    assert not (demo / "report.html").exists()


def test_conditions_make_the_exit_code(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(demo), "--fail-if", "itl_p99>+500%"]) == 0
    assert main(["report", str(demo), "--fail-if", "itl_p99>+5%", "--fail-if", "rate<-5%"]) == 1
    failed = capsys.readouterr().err.splitlines()
    assert len(failed) == 2
    assert all(line.startswith("fail-if: prefix caching off / ") for line in failed)


def test_an_ablation_has_a_row_for_each_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "ablation", {"v1": Server(5), "full-state": Server(4)}, {"256/16": 1.0})
    files = RunFiles(folder)
    summary = files.read_summary()
    summary.configurations["full-state"]["serve"] = {"ablate": "full-state"}
    shutil.rmtree(folder / "requests")
    files.write_summary(summary)
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "256/16: one part switched off at a time" in said
    row = next(line for line in said.splitlines() if "full-state" in line)
    assert "3.84 −20 %" in row
    assert "latencies at 3.75 req/s, the highest rate" not in said, "its table has all that fits a terminal"


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names with brackets and colons would mean styles and pictures to rich."""
    folder = write_run(tmp_path / "run", {"[/x]": Server(5), "v1 [bold]": Server(4)}, {"a [red] :fire:": 1.0})
    shutil.rmtree(folder / "requests")
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    table = said.partition("sustains")[0]
    for name in ("[/x]", "v1 [bold]", "a [red] :fire:"):
        assert name in table


def test_markdown_alone_is_on_stdout(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(demo), "--markdown"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("## Prefix caching on and off")
    assert "report.html" not in captured.out
    assert "report.html" in captured.err


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        ([], "no results in results/", 1),
        (["nowhere"], "nowhere is not a results folder", 1),
        (["nowhere", "--fail-if", "speed>3"], "invalid condition 'speed>3'", 2),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str, code: int) -> None:
    assert main(["report", *arguments]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
