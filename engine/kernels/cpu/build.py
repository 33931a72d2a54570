"""Compiles the kernels for an instruction set, when they are first used or for a wheel.

The library's name has a hash of its sources and flags, so one that was compiled from others is never loaded.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.errors import RedlineError

SOURCES = Path(__file__).parent
MAIN = "kernels.cpp"
PREBUILT = "prebuilt"  # beside the sources in a wheel: libraries that were compiled with it
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-Wno-uninitialized")

# Instruction sets, newest first: compiler flags, and the CPU features that they need, by their names in /proc/cpuinfo.
_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_HAS_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_HAS_BF16 = _HAS_AVX512 | {"avx512_bf16", "avx512_vnni"}
# GCC 12's first scheduling pass would load operands so early that the sums of a product no longer fit the registers.
_ARM = ("-fno-schedule-insns",)
_HAS_DOTPROD = frozenset({"asimd", "atomics", "asimddp"})
BY_MACHINE: dict[str, dict[str, tuple[tuple[str, ...], frozenset[str]]]] = {
    "x86_64": {
        "amx": ((*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), _HAS_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}),
        "avx512-bf16": (_BF16, _HAS_BF16),
        "avx512": (_AVX512, _HAS_AVX512),
        "avx2": (("-march=x86-64-v3",), frozenset({"avx2", "fma", "bmi2", "f16c"})),
    },
    "aarch64": {
        "neon-bf16": (("-march=armv8.2-a+dotprod+bf16+i8mm", *_ARM), _HAS_DOTPROD | {"bf16", "i8mm"}),
        "neon-dotprod": (("-march=armv8.2-a+dotprod", *_ARM), _HAS_DOTPROD),
        "neon": (("-march=armv8-a", *_ARM), frozenset({"asimd"})),
    },
}
ISAS = {isa: facts for isas in BY_MACHINE.values() for isa, facts in isas.items()}


class BuildError(RedlineError):
    """The kernels can't be compiled or loaded here."""


def isas_of_architecture() -> list[str]:
    """The instruction sets of this machine's architecture, newest first, whether or not this CPU has them."""
    return list(BY_MACHINE.get(platform.machine(), ()))


def cpu_features() -> frozenset[str]:
    """Features of the CPU, from /proc/cpuinfo; empty if it can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    features = (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(features, ()))


def missing_features(isa: str) -> list[str]:
    """CPU features that an instruction set needs and this machine lacks."""
    needs = ISAS[isa][1]
    lacks = sorted(needs - cpu_features())
    if not lacks and not _permitted(isa):
        return ["the system's permission to use AMX"]
    return lacks


def request_permission(isa: str) -> None:
    """Request what the system grants per process: without it, the first tile instruction would end the process.

    Raises BuildError if the system refuses.
    """
    if not _permitted(isa):
        raise BuildError("the system refuses this process the tile registers of AMX (arch_prctl, ARCH_REQ_XCOMP_PERM)")


def _permitted(isa: str) -> bool:
    return "amx_tile" not in ISAS[isa][1] or _may_use_tiles()


def supported_isas() -> list[str]:
    """The instruction sets that this machine supports, newest first. x86-64 without AVX2 has none: torch is faster."""
    return [isa for isa in ISAS if not missing_features(isa)]


@functools.cache
def _may_use_tiles() -> bool:
    """Request AMX's tile registers, which Linux grants per process (arch_prctl, ARCH_REQ_XCOMP_PERM)."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def library(isa: str, folder: Path | None = None, stack: tuple[int, int] | None = None) -> Path:
    """The compiled kernels of an instruction set: those of the wheel, or from `folder` (default: the user's cache).

    They are compiled if they are at neither place: of all stacks, or only of one, which takes a third of the time.
    Raises BuildError without a compiler, with the compiler's first error, or if the library can't be stored.

    Args:
        stack: the numbers of its formats, of weights and cache; None: all stacks.
    """
    whole = _name(isa)
    if (SOURCES / PREBUILT / whole).exists():
        return SOURCES / PREBUILT / whole
    only = () if stack is None else (f"-DREDLINE_STACK={stack[0]},{stack[1]}",)
    try:
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "kernels"
        path = folder / (whole if (folder / whole).exists() else _name(isa, only))
        if not path.exists():
            _compile(isa, path, only)
    except (OSError, RuntimeError) as error:  # no home folder, or it can't be written to
        raise BuildError(f"the CPU kernels can't be stored: {error} (XDG_CACHE_HOME sets another folder)") from error
    return path


def prebuild(isas: Sequence[str], folder: Path) -> dict[str, BuildError]:
    """Compile the kernels of instruction sets into a folder, for a wheel. Returns the errors of those that failed."""

    def failure(isa: str) -> BuildError | None:
        try:
            _run(_compiler(), isa, folder / _name(isa))
        except BuildError as error:
            return error
        return None

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as compilers:
        failures = zip(isas, compilers.map(failure, isas), strict=True)
        return {isa: error for isa, error in failures if error}


def _name(isa: str, only: Sequence[str] = ()) -> str:
    """The name of a library, with a hash of everything that it is compiled from."""
    digest = hashlib.sha256(" ".join((platform.machine(), *FLAGS, *ISAS[isa][0], *only)).encode())
    for source in [*sorted(SOURCES.glob("*.h")), SOURCES / MAIN]:
        digest.update(source.read_bytes())
    return f"{isa}-{digest.hexdigest()[:16]}.so"


def _compiler() -> str:
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise BuildError("there is no C++ compiler (c++, g++ or clang++) to compile the CPU kernels")
    return found


def _compile(isa: str, path: Path, only: Sequence[str]) -> None:
    compiler = _compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        if path.exists():  # another rank or server has compiled it in the meantime
            return
        _run(compiler, isa, path, only)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Where its file system has no locks, everyone compiles and the last library stays."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _run(compiler: str, isa: str, path: Path, only: Sequence[str] = ()) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        compiled = Path(scratch) / path.name
        command = [compiler, *FLAGS, *ISAS[isa][0], *only, "-o", str(compiled), str(SOURCES / MAIN)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            complaint = next((line for line in found.stderr.splitlines() if "error" in line), found.stderr.strip())
            raise BuildError(f"{Path(compiler).name} could not compile the CPU kernels: {complaint[:300]}")
        compiled.replace(path)
