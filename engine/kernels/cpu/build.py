"""Compiles the kernels for this machine's instructions, once: the result is kept and found by what it was made from."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from engine.errors import RedlineError

SOURCES = Path(__file__).parent
MAIN = "kernels.cpp"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-Wno-psabi", "-Wno-uninitialized")

# From the newest: the flags of the compiler, and the machine's own names for what they ask for.
_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_HAS_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_HAS_BF16 = _HAS_AVX512 | {"avx512_bf16", "avx512_vnni"}
LEVELS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "amx": ((*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), _HAS_BF16 | {"amx_tile", "amx_bf16", "amx_int8"}),
    "avx512-bf16": (_BF16, _HAS_BF16),
    "avx512": (_AVX512, _HAS_AVX512),
    "avx2": (("-march=x86-64-v3",), frozenset({"avx2", "fma", "bmi2", "f16c"})),
}


class BuildError(RedlineError):
    """The kernels can't be compiled here; the message says why."""


def machine_flags() -> frozenset[str]:
    """What the processor says it can do; empty where the system doesn't tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


def missing(level: str) -> list[str]:
    """What this machine lacks for a level, by the processor's names; empty where it can run it."""
    needs = LEVELS[level][1]
    lacks = sorted(needs - machine_flags())
    if not lacks and "amx_tile" in needs and not _may_use_tiles():
        return ["the system's permission to use AMX"]
    return lacks


def levels() -> list[str]:
    """The levels that this machine has, the newest first; none below the oldest, where torch is faster."""
    return [name for name in LEVELS if not missing(name)]


@functools.cache
def _may_use_tiles() -> bool:
    """Ask Linux for AMX's registers, which a process gets on request only (arch_prctl, ARCH_REQ_XCOMP_PERM)."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def library(level: str, folder: Path | None = None) -> Path:
    """The compiled kernels of a level, from `folder` (the user's cache unless given) or made now.

    Raises BuildError without a compiler, with the compiler's first complaint, or where they can't be kept.
    """
    try:
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "kernels"
        path = folder / f"{level}-{_name(level)}.so"
        if not path.exists():
            _compile(level, path)
    except (OSError, RuntimeError) as error:  # no home, or none that may be written to
        raise BuildError(f"the CPU kernels can't be kept: {error} (XDG_CACHE_HOME names another place)") from error
    return path


def _name(level: str) -> str:
    """Of what the kernels are made from."""
    made = hashlib.sha256(" ".join((platform.machine(), *FLAGS, *LEVELS[level][0])).encode())
    for source in [*sorted(SOURCES.glob("*.h")), SOURCES / MAIN]:
        made.update(source.read_bytes())
    return made.hexdigest()[:16]


def _compile(level: str, path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise BuildError("there is no C++ compiler (c++, g++ or clang++) to make the CPU kernels with")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks and servers may start at once: each makes its own, the last one stays.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made_here = Path(scratch) / path.name
        command = [compiler, *FLAGS, *LEVELS[level][0], "-o", str(made_here), str(SOURCES / MAIN)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            complaint = next((line for line in found.stderr.splitlines() if "error" in line), found.stderr.strip())
            raise BuildError(f"{Path(compiler).name} could not make the CPU kernels: {complaint[:300]}")
        made_here.replace(path)
