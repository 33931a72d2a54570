"""ARCHITECTURE.md lists the methods of a step in their order, and the new places of old files exist."""

import ast
import re

from tests.docs.blocks import DOCUMENTS, ROOT

PREDICATES = {"_has_result", "_may_schedule", "_publisher.stats_are_due"}


def calls_of_step() -> list[str]:
    """The methods that `EngineCore.step` calls on itself and its parts, in their order."""
    module = ast.parse((ROOT / "engine" / "core" / "engine.py").read_text())
    core = next(one for one in module.body if isinstance(one, ast.ClassDef) and one.name == "EngineCore")
    step = next(one for one in core.body if isinstance(one, ast.FunctionDef) and one.name == "step")
    called = [one.func for one in ast.walk(step) if isinstance(one, ast.Call)]
    ordered = sorted((one for one in called), key=lambda one: (one.lineno, one.col_offset))
    return [ast.unparse(one).removeprefix("self.") for one in ordered if ast.unparse(one).startswith("self.")]


def test_the_steps_of_a_step_are_its_methods() -> None:
    section = (ROOT / "ARCHITECTURE.md").read_text().split("\n## The path of a step\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\d+\. `([\w.]+)`", section, re.MULTILINE)
    assert listed == [one for one in calls_of_step() if one not in PREDICATES]


def test_no_document_has_a_conflict_of_a_merge() -> None:
    marks = re.compile(r"^(<{7}|>{7})( |$)", re.MULTILINE)
    assert [page.name for page in DOCUMENTS if marks.search(page.read_text())] == []


def test_structure_changes_lead_to_files_that_exist() -> None:
    """Full paths are checked in `test_named_places.py`; here, those that follow one of the same folder."""
    text = (ROOT / "docs" / "structure-changes.md").read_text()
    rows = re.findall(r"^\| (`[\w./]+\.(?:py|h)`.*?) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) > 80
    for before, now in rows:
        folder = ROOT
        for path in re.findall(r"`([\w./]+)`", now):
            folder = (ROOT / path).parent if "/" in path else folder
            assert (ROOT / path).exists() or (folder / path).exists(), f"{before}: {path}"
