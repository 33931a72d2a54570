"""The kernels on instruction sets that this machine lacks: plain C++ runs here, those of ARM in an emulator.

Each runs `portable.cpp`, which compares vector operations with scalar code, and a small model alone, in a batch and in
chunks. Its logits are the same on every instruction set but for rounding.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.kernels.cpu import build

PROGRAM = Path(__file__).parent / "portable.cpp"
FLAGS = [flag for flag in build.FLAGS if flag not in ("-O3", "-fPIC", "-shared")]
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
# A processor with the instruction set and little more, the optimization, and a choice of forms: to compile
# all of them as for use would take a minute.
EMULATED = {
    "neon": ("cortex-a72", "-O1", "-DFEW_FORMS"),
    "neon-dotprod": ("neoverse-n1", "-O1", "-DONLY_BYTES"),
    "neon-bf16": ("max", "-O3", "-DFEW_FORMS"),
}
# How far logits may be from those of plain C++, relative to the largest one. The products of bfloat16 differ in order
# and rounding; all others are exact, or fused with the sum.
MOST = {"float32": 1e-5, "bfloat16": 0.02, "int8-int8": 1e-3, "int4-int8": 1e-3}

Logits = dict[str, NDArray[np.float64]]


def compiled(folder: Path, compiler: str, *flags: str) -> Path:
    binary = folder / "portable"
    subprocess.run([compiler, *FLAGS, *flags, f"-I{build.SOURCES}", "-o", binary, PROGRAM], check=True)
    return binary


def run(*command: str | Path) -> Logits:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-500:]}{done.stderr[-500:]}"
    lines = [line.split() for line in done.stdout.splitlines()]
    return {form: np.array(logits, dtype=float) for form, *logits in lines}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Logits:
    """The logits of the kernels without instructions beyond those of every processor of this architecture."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    return run(compiled(tmp_path_factory.mktemp("plain"), compiler, "-O1"))


def test_plain_cpp_computes_the_same_bits_alone_in_a_batch_and_in_chunks(plain: Logits) -> None:
    assert len(plain) == 7, "every form of weights and cache"
    for form, logits in plain.items():
        assert len(logits) == 112
        assert 1 < np.abs(logits).max() < 10, form
    near = plain["bfloat16"] - plain["bfloat16-int8"]
    assert 0 < np.abs(near).max() < 0.05 * np.abs(plain["bfloat16"]).max(), "forms of the cache differ in rounding"


@pytest.mark.skipif(not (CROSS and EMULATOR), reason="needs aarch64-linux-gnu-g++ and qemu-aarch64")
@pytest.mark.parametrize("isa", build.BY_MACHINE["aarch64"])
def test_arm_differs_from_plain_cpp_only_in_rounding(isa: str, plain: Logits, tmp_path: Path) -> None:
    assert CROSS is not None
    assert EMULATOR is not None
    processor, *flags = EMULATED[isa]
    binary = compiled(tmp_path, CROSS, "-static", *build.ISAS[isa][0], *flags)
    found = run(EMULATOR, "-cpu", processor, binary)
    assert set(found) == {form for form in MOST if "-DONLY_BYTES" not in flags or form.startswith("int")}
    for form, logits in found.items():
        assert np.abs(logits - plain[form]).max() < MOST[form] * np.abs(plain[form]).max(), form
