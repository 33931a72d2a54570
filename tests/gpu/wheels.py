"""`make gpu-wheels`: fetches the wheels that a GPU machine without a network needs, into .gpu-wheels.

Names and versions are in wheels.yaml. On that machine, in the repository:

    python3 -m pip install --no-index --no-deps --target SITE .gpu-wheels/*.whl
    PYTHONPATH=SITE:. python3 -m tests.gpu.check
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).with_name("wheels.yaml")


@dataclass(frozen=True)
class Wheels:
    """wheels: version by name. present: names of what the machine has; optional: of what Redline does without."""

    python: str
    platforms: tuple[str, ...]
    limit_mib: int
    wheels: dict[str, str]
    present: frozenset[str]
    optional: frozenset[str]


def read(path: Path = DATA) -> Wheels:
    data = yaml.safe_load(path.read_text())
    sets = {name: frozenset(data[name]) for name in ("present", "optional")}
    return Wheels(data["python"], tuple(data["platforms"]), data["limit_mib"], data["wheels"], **sets)


def command(wheels: Wheels, folder: Path) -> list[str]:
    """The call of pip; the wheels' own needs are in the list, or present."""
    made = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    made += ["--python-version", wheels.python, "--dest", str(folder)]
    for platform in wheels.platforms:
        made += ["--platform", platform]
    return made + [f"{name}=={version}" for name, version in wheels.wheels.items()]


def listing(folder: Path, limit_mib: int) -> tuple[list[str], bool]:
    """A line for each wheel and one for all, and whether they are below the limit."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    total = sum(sizes.values())
    lines = [f"{size:>12,}  {name}" for name, size in sizes.items()]
    return [*lines, f"{total:>12,}  bytes in {len(sizes)} wheels, of {limit_mib} MiB"], total < limit_mib << 20


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.wheels", description="Wheels for a GPU machine.")
    parser.add_argument("--out", type=Path, default=ROOT / ".gpu-wheels")
    folder = parser.parse_args(arguments).out
    wheels = read()
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):  # two versions of a package can't be installed together
        old.unlink()
    done = subprocess.run(command(wheels, folder), check=False)
    if done.returncode:
        return done.returncode
    lines, fits = listing(folder, wheels.limit_mib)
    print("\n".join(lines))
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
