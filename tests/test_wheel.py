"""Wheels: with compiled kernels, which need no compiler any more, and without."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine.kernels.cpu import build

ROOT = Path(__file__).parents[1]
ISA = next(iter(build.supported_isas()), None)
SOURCE = (
    "setup.py", "pyproject.toml", "README.md", "LICENSE", "redline.py", "cli", "engine", "bench", "plots", "datasets",
)  # fmt: skip
LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from engine.kernels.cpu import bindings, build
assert build.__file__.startswith(sys.argv[1])
print(build.library(sys.argv[2]))
assert bindings.load(sys.argv[2], "float32", "float32").redline_stack
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the sources, whose kernels have one stack instead of seven, so that they compile in seconds."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    kernels = copy / "engine" / "kernels" / "cpu" / build.MAIN
    kernels.write_text("#define REDLINE_STACK FLOAT32, FLOAT32\n" + kernels.read_text())
    return copy


def make_wheel(source: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    made = source.parent / "wheels"
    shutil.rmtree(made, ignore_errors=True)
    subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", made, source],
        env={**os.environ, "PYTHONPATH": "", **environment}, cwd=source.parent, check=True,
    )  # fmt: skip
    (wheel,) = made.iterdir()
    return wheel


def load(installed: Path, isa: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Load the kernels in a process without a compiler."""
    return subprocess.run(
        [sys.executable, "-c", LOAD, installed, isa],
        env={"PATH": os.devnull, "XDG_CACHE_HOME": str(cache)}, cwd=cache, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(ISA is None, reason="no instruction set of this machine has CPU kernels")
def test_a_wheel_brings_its_kernels(source: Path, tmp_path: Path) -> None:
    assert ISA is not None
    wheel = make_wheel(source, REDLINE_PREBUILT_ISAS=ISA)
    assert wheel.stem.split("-")[2:4] == ["py3", "none"]
    assert wheel.stem.endswith(f"-linux_{os.uname().machine}")
    installed, cache = tmp_path / "installed", tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    kernels = installed / "engine" / "kernels" / "cpu"
    (library,) = (kernels / build.PREBUILT).iterdir()
    loaded = load(installed, ISA, cache)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == str(library)
    assert list(cache.iterdir()) == [], "nothing was compiled"

    with (kernels / "simd.h").open("a") as header:
        header.write("// changed\n")
    loaded = load(installed, ISA, cache)
    assert "there is no C++ compiler" in loaded.stderr, "kernels that were compiled from other sources are not loaded"


def test_without_a_compiler_a_wheel_is_for_any_platform(source: Path, tmp_path: Path) -> None:
    assert make_wheel(source, PATH=os.devnull).stem.endswith("-py3-none-any")


def test_unknown_instruction_sets_are_named(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        make_wheel(source, REDLINE_PREBUILT_ISAS="avx3")
    assert "REDLINE_PREBUILT_ISAS: avx3; known here are" in capfd.readouterr().err
