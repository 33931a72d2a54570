"""Threads of a step that are interrupted: a signal handler keeps one from running, as another program would."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.cpu.build import SOURCES

PROGRAM = Path(__file__).parent / "interrupted.cpp"
ISA = ("-march=x86-64-v3",) if platform.machine() == "x86_64" else ()
FLAGS = ("-O1", "-std=c++20", "-pthread", "-Wno-psabi", *ISA)
SANITIZED = ("-g", "-fsanitize=thread")


def build(binary: Path, *flags: str) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C++ compiler")
    subprocess.run([compiler, *FLAGS, *flags, f"-I{SOURCES}", "-o", binary, PROGRAM], check=True)
    return binary


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("team") / "interrupted")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the program with ThreadSanitizer, which reports memory that threads use without an order."""
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "empty.cpp").write_text("int main() {}")
    compiler, randomize = shutil.which("g++"), shutil.which("setarch")
    if compiler is None or randomize is None:
        pytest.skip("needs g++ and setarch")
    empty, fixed = str(folder / "empty"), [randomize, "-R"]  # it does not know every layout of memory
    linked = subprocess.run([compiler, *SANITIZED, "-o", empty, folder / "empty.cpp"], capture_output=True, check=False)
    if linked.returncode or subprocess.run([*fixed, empty], capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer does not run here")
    return [*fixed, str(build(folder / "interrupted", *SANITIZED))]


def check(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize("case", ["order", "asleep", "waiting", "late", "task", "stress"])
def test_ops_are_whole_and_in_order(case: str, program: Path) -> None:
    check(program, case)


@pytest.mark.parametrize("case", ["order", "late", "stress"])
def test_memory_is_used_in_order(case: str, sanitized: list[str]) -> None:
    check(*sanitized, case)
