"""Every query of the dashboard and of the alerts is about metrics and labels that /metrics has."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from engine.api.prometheus import make_registry
from engine.messages import MMSpec, Ready
from tests.docs.test_serving_pages import Replicas

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "serving" / "dashboards"
TARGET_LABELS = {"instance", "job"}  # which Prometheus adds
NAME = r"(?:vllm|redline):\w+|process_\w+|\bup\b"
SELECTOR = re.compile(rf"({NAME})(?:\{{(.*?)\}})?(\[[^\]]+\])?")
FUNCTIONS = {"sum", "avg", "rate", "increase", "min_over_time", "histogram_quantile", "by", "on", "and"}


class Exported:
    """What /metrics exports: kinds and labels by the name of a sample."""

    def __init__(self, text: str):
        kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
        self.labels: dict[str, set[str]] = {"up": set()}
        self.kinds: dict[str, str] = {"up": "gauge"}
        for sample, given in re.findall(r"^([\w:]+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
            self.labels.setdefault(sample, set()).update(re.findall(r'(\w+)="', given))
            self.kinds[sample] = kinds.get(sample, "histogram")


def exported_text() -> str:
    """The metrics of a server with replicas and inputs, and those of one API process."""
    ready = Ready("/m", "cpu", "float32", 300, 128, 4, 64, 16, 10, True, mm=MMSpec("m", {}, {}), role="decode")

    async def export() -> str:
        return generate_latest(make_registry(SimpleNamespace(client=Replicas(ready), model="m"))).decode()

    return asyncio.run(export())


@pytest.fixture(scope="module")
def exported() -> Exported:
    return Exported(exported_text())


def panels() -> Iterator[dict[str, Any]]:
    for panel in json.loads((FOLDER / "redline.json").read_text())["panels"]:
        if panel["type"] != "row":
            yield panel


def queries() -> Iterator[tuple[str, str]]:
    """Names and expressions of all queries."""
    for panel in panels():
        for target in panel["targets"]:
            yield f"panel {panel['title']} {target['refId']}", target["expr"]
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@pytest.mark.parametrize(("what", "query"), queries(), ids=[what for what, _ in queries()])
def test_a_query_is_about_what_is_exported(exported: Exported, what: str, query: str) -> None:
    assert query.count("(") == query.count(")")
    selectors = SELECTOR.findall(query)
    assert selectors
    every: set[str] = set(TARGET_LABELS)
    for name, matchers, window in selectors:
        assert name in exported.labels, name
        labels = exported.labels[name] | TARGET_LABELS
        every |= labels
        assert set(re.findall(r"(\w+)(?:=~|!=|!~|=)", matchers)) <= labels, name
        function = re.search(rf"(\w+) ?\({re.escape(name)}", query)
        if window:
            assert function is not None
            counter = exported.kinds[name] in ("counter", "histogram")
            assert (function[1] in ("rate", "increase")) == counter, f"{function[1]} of a {exported.kinds[name]}"
        else:
            assert exported.kinds[name] == "gauge", f"{name} only grows"
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        assert {label.strip() for label in grouped.split(",")} <= every
    if "histogram_quantile" in query:
        assert all(name.endswith("_bucket") for name, *_ in selectors)
        assert re.search(r"by \([^)]*\ble\b", query)
    rest = re.sub(r"\{.*?\}|\[.*?\]|(?:by|on) \([^)]*\)", "", SELECTOR.sub("", query))
    assert set(re.findall(r"[a-z_]{2,}", rest)) <= FUNCTIONS, "functions that were never checked"


def test_legends_name_labels_of_their_queries(exported: Exported) -> None:
    for panel in panels():
        for target in panel["targets"]:
            labels = {label for name, *_ in SELECTOR.findall(target["expr"]) for label in exported.labels[name]}
            used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert used <= labels | TARGET_LABELS, panel["title"]
            if re.match(r"sum", target["expr"]):
                grouped = re.search(r"by \(([^)]*)\)", target["expr"])
                assert used <= set(re.split(r", *", grouped[1]) if grouped else ()), panel["title"]


def test_panels_do_not_overlap_and_have_names_of_their_own() -> None:
    board = json.loads((FOLDER / "redline.json").read_text())
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not places & cells, panel["title"]
        assert max(x for x, _ in cells) < 24
        places |= cells
    titles = [panel["title"] for panel in board["panels"]]
    assert len(titles) == len(set(titles)) > 20
    assert len({panel["id"] for panel in board["panels"]}) == len(titles)


def test_variables_are_defined() -> None:
    text = (FOLDER / "redline.json").read_text()
    defined = {one["name"] for one in json.loads(text)["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", text))
    assert used == defined


def test_alerts_say_what_to_do() -> None:
    page = (FOLDER.parent / "observability.md").read_text()
    assert len({rule["alert"] for rule in rules()}) == len(rules()) >= 12
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert f"| `{rule['alert']}` | {rule['labels']['severity']} |" in page
        label = re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])
        assert label, rule["alert"]
