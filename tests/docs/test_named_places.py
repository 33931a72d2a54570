"""Files, functions, methods and constants that the documentation names exist."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WHERE = ROOT / "docs" / "extending" / "where.md"
# `file`: `name`, `Class.method`, …
NAMED = re.compile(r"`([\w./-]+\.(?:py|h|cpp))`: ((?:`[\w.]+`(?:, )?)+)")
FEWEST = {"life-of-a-request.md": 70, "where.md": 400}  # places that these pages name, so that the pattern still fits


def places(page: Path) -> list[tuple[str, str]]:
    """Pairs of a file and a name."""
    text = " ".join(page.read_text(encoding="utf-8").split())
    return [(file, name) for file, names in NAMED.findall(text) for name in re.findall(r"[\w.]+", names)]


def assigned(node: ast.stmt) -> Iterator[str]:
    """Names to which a statement assigns, also as a tuple."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        for leaf in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(leaf, ast.Name):
                yield leaf.id


@cache
def defined(path: Path) -> set[str]:
    """Names of a module: classes, functions, constants, members as Class.member; of other files all words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"\w+", text))
    names: set[str] = set()
    for node in ast.parse(text).body:
        names.update(assigned(node))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        for member in node.body if isinstance(node, ast.ClassDef) else ():
            inner = [member.name] if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) else assigned(member)
            names.update(f"{node.name}.{name}" for name in inner)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_exist(page: Path) -> None:
    """Files and folders below the packages."""
    named = re.findall(r"`((?:bench|cli|datasets|docs|engine|plots|tests)/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page: Path) -> None:
    found = places(page)
    assert len(found) >= FEWEST.get(page.name, 0)
    assert not [f"{file}: {name}" for file, name in found if name not in defined(ROOT / file)]


def test_each_change_has_a_place() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|.*\|$", WHERE.read_text(encoding="utf-8"), re.MULTILINE)
    changes = {change: code for change, code in rows if change not in ("change", "constant", "area")}
    assert len(changes) > 100
    assert not [one for one, code in changes.items() if "`" not in one + code and "](" not in one + code]
