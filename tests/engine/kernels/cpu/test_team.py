"""Threads of a step that are interrupted: a signal handler keeps one from running, as another program would."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.cpu.build import SOURCES

PROGRAM = Path(__file__).parent / "interrupted.cpp"
FLAGS = ("-O1", "-std=c++20", "-pthread", "-march=x86-64-v3", "-Wno-psabi")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C++ compiler")
    binary = tmp_path_factory.mktemp("team") / "interrupted"
    subprocess.run([compiler, *FLAGS, f"-I{SOURCES}", "-o", binary, PROGRAM], check=True)
    return binary


@pytest.mark.parametrize("case", ["order", "asleep", "waiting", "task"])
def test_ops_are_whole_and_in_order(case: str, program: Path) -> None:
    done = subprocess.run([program, case], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
