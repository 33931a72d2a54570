"""What PyTorch knows of a device, asked in a child process: a program that asks a GPU keeps a context on it."""

import importlib.util
import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from engine.text import first_line

TIMEOUT_S = 120.0
MODULE = "engine.devices.probe"


class DeviceFacts(msgspec.Struct, frozen=True):
    """The first devices of a type that a process may use, or in `error` why there is none."""

    error: str = ""
    name: str = ""  # of the first
    free_bytes: int | None = None  # the least of the devices; None: they do not tell
    capability: tuple[int, int] | None = None  # of GPUs by NVIDIA, the lowest
    count: int = 1  # of all that the process may use
    differ: bool = False  # in their names
    driver: str = ""


@lru_cache
def ask(device: str, ranks: int = 1) -> DeviceFacts:
    """Ask once in this process's life, about the first device or as many as there are ranks.

    `device` is a device type of torch.
    """
    try:
        command = [sys.executable, "-m", MODULE, device, str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return DeviceFacts(error=f"the device did not answer within {TIMEOUT_S:.0f} s")
    lines = done.stdout.splitlines()
    try:
        return msgspec.json.decode(lines[-1], type=DeviceFacts)
    except (IndexError, msgspec.DecodeError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        cause = said[-1].strip() if said else f"exit code {done.returncode}"
        return DeviceFacts(error=f"PyTorch could not be asked: {cause}")


def torch_build() -> dict[str, str]:
    """The version of the installed torch, and those of CUDA and ROCm if it was built for them; does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return {}
    return dict(re.findall(r"^(__version__|cuda|hip)\b[^=\n]*= *'([^']*)'", text, re.MULTILINE))


def measure(device: str, ranks: int) -> DeviceFacts:
    """Ask in this process."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    try:
        if found is None or found.type != device:
            if device == "cuda":
                torch.get_device_module(device).init()  # raises the reason
            return DeviceFacts(error=f"PyTorch {torch.__version__} finds no device of this type")
        module: Any = torch.get_device_module(device)
        count = int(module.device_count())
        used = range(min(ranks, count))
        free = min(int(module.mem_get_info(i)[0]) for i in used) if hasattr(module, "mem_get_info") else None
        names = [str(module.get_device_name(i)) if hasattr(module, "get_device_name") else "" for i in used]
        common = DeviceFacts(name=names[0], free_bytes=free, count=count, differ=len(set(names)) > 1)
        if device != "cuda":
            return common
        if torch.version.hip:
            return replace(common, driver=f"ROCm {torch.version.hip}")
        capability = min(tuple(module.get_device_capability(i)) for i in used)
        return replace(common, capability=capability, driver=_driver())
    except (RuntimeError, AssertionError) as error:
        # Only the cause: PyTorch goes on with links.
        return DeviceFacts(error=first_line(error).split(". ")[0].rstrip("."))


def driver_version() -> tuple[int, int]:
    """The newest version of CUDA that the NVIDIA driver supports; needs no context on a GPU."""
    import ctypes

    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _driver() -> str:
    return "CUDA {}.{}".format(*driver_version())


if __name__ == "__main__":
    print(json.dumps(msgspec.to_builtins(measure(sys.argv[1], int(sys.argv[2])))))
