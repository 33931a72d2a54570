"""Compiles the kernels for an instruction set. The library is cached under a hash of its sources and flags."""

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
from collections.abc import Iterator
from pathlib import Path

from engine.errors import RedlineError

SOURCES = Path(__file__).parent
MAIN = "kernels.cpp"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-Wno-uninitialized")

# Instruction sets, newest first: compiler flags, and the CPU features that they need, by their names in /proc/cpuinfo.
_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_HAS_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_HAS_BF16 = _HAS_AVX512 | {"avx512_bf16", "avx512_vnni"}
ISAS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "amx": ((*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), _HAS_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}),
    "avx512-bf16": (_BF16, _HAS_BF16),
    "avx512": (_AVX512, _HAS_AVX512),
    "avx2": (("-march=x86-64-v3",), frozenset({"avx2", "fma", "bmi2", "f16c"})),
}


class BuildError(RedlineError):
    """The kernels can't be compiled or loaded here."""


def cpu_features() -> frozenset[str]:
    """Features of the CPU, from /proc/cpuinfo; empty if it can't be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


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
    """The instruction sets that this machine supports, newest first. Without AVX2 there is none: torch is faster."""
    return [isa for isa in ISAS if not missing_features(isa)]


@functools.cache
def _may_use_tiles() -> bool:
    """Request AMX's tile registers, which Linux grants per process (arch_prctl, ARCH_REQ_XCOMP_PERM)."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def library(isa: str, folder: Path | None = None) -> Path:
    """The compiled kernels of an instruction set, from `folder` (default: the user's cache), or compiled now.

    Raises BuildError without a compiler, with the compiler's first error, or if the library can't be stored.
    """
    try:
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "kernels"
        path = folder / f"{isa}-{_digest(isa)}.so"
        if not path.exists():
            _compile(isa, path)
    except (OSError, RuntimeError) as error:  # no home folder, or it can't be written to
        raise BuildError(f"the CPU kernels can't be stored: {error} (XDG_CACHE_HOME sets another folder)") from error
    return path


def _digest(isa: str) -> str:
    """A hash of everything that the library is compiled from."""
    digest = hashlib.sha256(" ".join((platform.machine(), *FLAGS, *ISAS[isa][0])).encode())
    for source in [*sorted(SOURCES.glob("*.h")), SOURCES / MAIN]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(isa: str, path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise BuildError("there is no C++ compiler (c++, g++ or clang++) to compile the CPU kernels")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        if path.exists():  # another rank or server has compiled it in the meantime
            return
        _run(compiler, isa, path)


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


def _run(compiler: str, isa: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        compiled = Path(scratch) / path.name
        command = [compiler, *FLAGS, *ISAS[isa][0], "-o", str(compiled), str(SOURCES / MAIN)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            complaint = next((line for line in found.stderr.splitlines() if "error" in line), found.stderr.strip())
            raise BuildError(f"{Path(compiler).name} could not compile the CPU kernels: {complaint[:300]}")
        compiled.replace(path)
