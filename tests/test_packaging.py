"""What `pip install .` installs: all packages, and the files that they read."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_all_packages_are_installed() -> None:
    tops = {name.partition(".")[0] for name in SETUPTOOLS["packages"]}
    folders = {file.parent for top in tops for file in (ROOT / top).rglob("*.py")}
    assert {str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders} == set(SETUPTOOLS["packages"])


def test_files_beside_the_code_are_installed() -> None:
    kinds = {".h", ".cpp", ".js", ".html", ".css"}
    found = {file for file in (ROOT / "engine").rglob("*") if file.suffix in kinds}
    patterns = SETUPTOOLS["package-data"].items()
    installed = {
        file for package, own in patterns for one in own for file in (ROOT / package.replace(".", "/")).glob(one)
    }
    assert found
    assert found <= installed
