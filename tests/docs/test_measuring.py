"""docs/measuring/reports.md lists exactly what result files hold, and other pages what bench and report know."""

import dataclasses
import re
from pathlib import Path

import pytest

from bench.results import Answer, GeneratorRecord, PointRecord, RequestRecord, ServerState, Summary
from bench.sweeps.sweepfile import _OPTIONS as SWEEP_OPTIONS
from bench.target import target
from bench.workloads import WORKLOAD_KINDS
from cli.exit_codes import FAILED_REQUESTS, UNDECIDED
from plots.compare import METRICS

PAGES = Path(__file__).parents[2] / "docs" / "measuring"


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    text = (PAGES / page).read_text(encoding="utf-8")
    return re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def names(text: str) -> list[str]:
    """What the first cells of table rows name."""
    cells = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("points.csv", PointRecord),
        ("generators.csv", GeneratorRecord),
        ("requests/POINT_ID.parquet", RequestRecord),
        ("metrics/POINT_ID.parquet", ServerState),
    ],
)
def test_columns_are_those_of_the_files(heading: str, kind: type) -> None:
    """In the order of the files."""
    assert names(section("reports.md", heading)) == fields(kind)


def test_fields_of_the_summary() -> None:
    summary, answer = section("reports.md", "summary.json").split("An entry of `answers`:")
    assert sorted(names(summary)) == sorted(fields(Summary))
    assert sorted(names(answer)) == sorted(fields(Answer))


def test_exit_codes() -> None:
    listed = re.findall(r"^\| (\d+) \|", section("reports.md", "Exit codes"), flags=re.MULTILINE)
    assert [int(code) for code in listed] == [0, 1, 2, FAILED_REQUESTS, UNDECIDED, 130]


def test_phases_and_verdicts() -> None:
    text = section("reports.md", "points.csv")
    phases = PointRecord.__annotations__["phase"].__args__
    assert all(f"`{phase}`" in text for phase in phases)
    assert names(section("index.md", "Verdicts"))[:4] == ["sustained", "not sustained", "undecided", "invalid"]


def test_metrics_of_conditions() -> None:
    text = section("ci.md", "Fail a build")
    table = text[text.index("| metric | unit |") :]
    assert set(names(table)) == {metric.key for metric in METRICS}


def test_options_of_sweeps() -> None:
    text = section("ci.md", "Sweep files")
    table = text[text.index("| option | default |") :]
    assert set(names(table)) == SWEEP_OPTIONS


def test_kinds_of_workloads() -> None:
    text = section("workloads.md", "Kinds and their fields")
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| ?(.*?) ?\|$", text, flags=re.MULTILINE)
    assert {kind for kind, _, _ in rows} == set(WORKLOAD_KINDS)
    for kind, required, optional in rows:
        assert set(re.findall(r"`(\w+)`", required)) == WORKLOAD_KINDS[kind].required
        if not optional.startswith("as "):
            known = WORKLOAD_KINDS[kind].optional | {"auto", "train"}  # and values of theirs
            assert WORKLOAD_KINDS[kind].optional <= set(re.findall(r"`(\w+)`", optional)) <= known


def test_fields_that_cannot_be_added() -> None:
    text = (PAGES / "targets.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if "cannot be set with `--extra-body`" in line)
    assert set(re.findall(r"`(\w+)`", line)) == set(target._SET_ELSEWHERE)
