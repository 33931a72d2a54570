"""The wheels for a GPU machine are all that Redline needs there beside what it has, and no more."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tests.gpu import wheels

ROOT = Path(__file__).parents[2]
# What runs there: the product and the checks.
FOLDERS = ("cli", "engine", "bench", "plots", "tests/gpu", "tests/engine/worker", "tests/engine/kernels/triton")
MARKERS = {"python_version": "3.12", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
OWN = {"cli", "engine", "bench", "plots", "tests", "redline"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Top-level names of modules that any file imports, wherever in the file."""
    found: set[str] = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - OWN - set(sys.stdlib_module_names)


def needs(names: set[str], present: frozenset[str]) -> set[str]:
    """Distributions and all that they need on the GPU machine, by the metadata of the installed ones.

    What the machine has may be older than what is installed here, and has what it needs.
    """
    found: set[str] = set()
    left = set(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        if name in present:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate(MARKERS | {"extra": ""}):
                left.add(normal(requirement.name))
    return found


def test_the_list_is_complete() -> None:
    data = wheels.read()
    modules, distributions = imported(), importlib.metadata.packages_distributions()
    names = {normal(name) for module in modules for name in distributions.get(module, [module])}
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    names |= {normal(Requirement(line).name) for line in declared} | {"pytest-asyncio"}
    needed = needs(names - data.optional, data.present)
    assert "torch" in needed
    assert needed - data.present - set(data.wheels) == set(), "neither on the machine nor fetched"
    assert set(data.wheels) - needed == set(), "fetched for nothing"
    assert data.present - needed == set(), "on the machine, but not needed"


def test_what_is_fetched_is_named_with_its_version(tmp_path: Path) -> None:
    data = wheels.read()
    made = wheels.command(data, tmp_path)
    assert "--no-deps" in made
    assert "--only-binary=:all:" in made
    assert made[made.index("--python-version") + 1] == "3.12"
    assert [one for one in made if "==" in one] == [f"{name}=={version}" for name, version in data.wheels.items()]


def test_the_listing_has_sizes_and_says_whether_they_fit(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(bytes(700_000))
    (tmp_path / "b-1-py3-none-any.whl").write_bytes(bytes(500_000))
    lines, fits = wheels.listing(tmp_path, 2)
    assert fits
    assert lines[0].split() == ["700,000", "a-1-py3-none-any.whl"]
    assert lines[-1].split()[0] == "1,200,000"
    assert not wheels.listing(tmp_path, 1)[1]
