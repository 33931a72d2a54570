"""Energy of NVIDIA's GPUs by NVML, through the package `nvidia-ml-py` (module `pynvml`), which is optional."""

import contextlib
import importlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from bench.measurement.energy import EnergyError, EnergyMeter, GpuReading
from bench.measurement.machine import MachineReader
from bench.target import Target

FLAG = "--energy-gpus"
MAX_INDEX = 1023  # no machine has as many GPUs
Gpus = tuple[int, ...] | Literal["all"]  # numbers as of nvidia-smi; (): none


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of this machine; `pids` are the processes that compute on it, as far as NVML tells."""

    handle: Any
    index: int
    name: str
    uuid: str
    pids: frozenset[int]


@dataclass(frozen=True, slots=True)
class EnergySource:
    """The meter of a run, None if energy is not measured; `described` says for the result files what or why."""

    meter: EnergyMeter | None
    described: str


class NvmlMeter:
    """Reads the energy counters of GPUs (Volta and newer), and the power of those that have none.

    Args:
        nvml: the module pynvml, initialized.
    """

    def __init__(self, nvml: Any, gpus: Collection[Gpu]):
        self._nvml = nvml
        self._handles = [(gpu.handle, self._has_counter(gpu)) for gpu in gpus]

    @property
    def counters(self) -> int:
        """How many of the GPUs have an energy counter."""
        return sum(has_counter for _, has_counter in self._handles)

    def read(self) -> tuple[GpuReading, ...]:
        with _one_line(self._nvml):
            return tuple(self._read(handle, has_counter) for handle, has_counter in self._handles)

    def _read(self, handle: Any, has_counter: bool) -> GpuReading:
        if has_counter:
            return GpuReading(energy_j=self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
        return GpuReading(power_w=self._nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)

    def _has_counter(self, gpu: Gpu) -> bool:
        with _one_line(self._nvml, f"GPU {gpu.index} ({gpu.name})"):
            try:
                self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)
            except self._nvml.NVMLError_NotSupported:
                self._nvml.nvmlDeviceGetPowerUsage(gpu.handle)  # raises if it has neither
                return False
        return True


def load_nvml() -> Any:
    """The module pynvml, initialized. Raises EnergyError: not installed, or no driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise EnergyError("the package nvidia-ml-py is not installed (pip install nvidia-ml-py)") from None
    with _one_line(nvml):
        nvml.nvmlInit()
    return nvml


def find_energy(
    wanted: Gpus | None, target: Target, device: str = "", load: Callable[[], Any] = load_nvml
) -> EnergySource:
    """The meter for the GPUs of a server.

    Args:
        wanted: the GPUs to measure; None: if the server runs on this machine, those on which its processes compute or,
            where NVML does not tell, those that CUDA_VISIBLE_DEVICES names.
        device: that the server reports, "" if it reports none.

    Raises EnergyError naming the flag if GPUs were wanted that cannot be measured.
    """
    if wanted == ():
        return EnergySource(None, f"not measured: {FLAG} none")
    try:
        if wanted is not None:
            nvml = load()
            gpus = _numbered(list_gpus(nvml), wanted)
        else:
            machine = MachineReader(target.base_url)
            if not machine.is_local:
                raise EnergyError("the server does not run on this machine")
            if device.split(" ", 1)[0] == "cpu":
                raise EnergyError("the server computes on the CPU")
            nvml = load()
            found = visible(list_gpus(nvml), os.environ)
            server = machine.server_pids()
            gpus = [gpu for gpu in found if gpu.pids & server] or found
        meter = NvmlMeter(nvml, gpus)
    except EnergyError as error:
        if wanted is None:
            return EnergySource(None, f"not measured: {error}")
        raise EnergyError(f"energy cannot be measured: {error} ({FLAG})") from None
    names = ", ".join(f"GPU {gpu.index} {gpu.name}" for gpu in gpus)
    counters = meter.counters
    how = "energy counter" if counters == len(gpus) else "power" if not counters else "energy counter or power"
    return EnergySource(meter, f"{names} by NVML ({how})")


def list_gpus(nvml: Any) -> list[Gpu]:
    """All GPUs that NVML finds. Raises EnergyError if there are none."""
    with _one_line(nvml):
        gpus = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    if not gpus:
        raise EnergyError("NVML finds no GPU")
    return gpus


def visible(gpus: list[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names by number or UUID; all if it is not set. Raises EnergyError if none is.

    As CUDA does, ignore what follows an invalid entry. Its numbers are those of NVML on machines with GPUs of one kind.
    """
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return gpus
    found: list[Gpu] = []
    for word in text.split(","):
        name = word.strip()
        named = [gpu for gpu in gpus if name == str(gpu.index) or (name[:4] == "GPU-" and gpu.uuid.startswith(name))]
        if len(named) != 1:
            break
        found += named
    if not found:
        raise EnergyError(f"CUDA_VISIBLE_DEVICES={text} names no whole GPU")
    return found


def parse_gpus(text: str) -> Gpus:
    """`all`, `none`, or numbers separated by commas. Raises ValueError."""
    word = text.strip().lower()
    if word in ("all", "none"):
        return "all" if word == "all" else ()
    numbers = tuple(dict.fromkeys(int(part) for part in word.split(",")))
    if min(numbers) < 0:
        raise ValueError("a number is negative")
    if max(numbers) > MAX_INDEX:
        raise ValueError(f"a number is above {MAX_INDEX}")
    return numbers


def _numbered(gpus: list[Gpu], wanted: Gpus) -> list[Gpu]:
    if wanted == "all":
        return gpus
    for index in wanted:
        if index >= len(gpus):
            raise EnergyError(f"there is no GPU {index}; this machine has {len(gpus)}")
    return [gpus[int(index)] for index in wanted]


def _gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    pids: frozenset[int] = frozenset()
    with contextlib.suppress(nvml.NVMLError):
        pids = frozenset(process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return Gpu(handle, index, _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle)), pids)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name  # bytes: versions of the package before 11.5


@contextlib.contextmanager
def _one_line(nvml: Any, what: str = "NVML") -> Iterator[None]:
    """Turn errors of NVML into EnergyError."""
    try:
        yield
    except nvml.NVMLError as error:
        raise EnergyError(f"{what}: {error}") from None
