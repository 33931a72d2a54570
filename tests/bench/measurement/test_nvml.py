"""The binding of NVML against a stand-in for the module pynvml, with its names and classes of errors."""

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from bench.measurement.energy import EnergyError, GpuReading
from bench.measurement.nvml import NvmlMeter, find_energy, list_gpus, load_nvml, parse_gpus, visible
from bench.target import Target

LOCAL, REMOTE = Target("http://127.0.0.1:1", "m"), Target("http://192.0.2.1:8000", "m")


class NVMLError(Exception):
    pass


class NotSupportedError(NVMLError):
    def __str__(self) -> str:
        return "Not Supported"


class LibraryNotFoundError(NVMLError):
    def __str__(self) -> str:
        return "NVML Shared Library Not Found"


class GpuIsLostError(NVMLError):
    def __str__(self) -> str:
        return "GPU is lost"


@dataclass
class StandInGpu:
    """`energy_mj`, `power_mw`: None: the GPU doesn't support it."""

    name: str | bytes = "NVIDIA H100 80GB HBM3"
    uuid: str = "GPU-11111111-aaaa"
    energy_mj: int | None = 5_000_000
    power_mw: int | None = 412_500
    pids: list[int] = field(default_factory=list)


class StandInNvml:
    """Has what the binding uses of pynvml; handles are the GPUs themselves."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NotSupportedError

    def __init__(self, *gpus: StandInGpu, has_driver: bool = True):
        self.gpus = gpus
        self.has_driver = has_driver
        self.lost = False

    def nvmlInit(self) -> None:
        if not self.has_driver:
            raise LibraryNotFoundError

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> StandInGpu:
        return self.gpus[index]

    def nvmlDeviceGetName(self, gpu: StandInGpu) -> str | bytes:
        return gpu.name

    def nvmlDeviceGetUUID(self, gpu: StandInGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: StandInGpu) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in gpu.pids]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: StandInGpu) -> int:
        return self._supported(gpu.energy_mj)

    def nvmlDeviceGetPowerUsage(self, gpu: StandInGpu) -> int:
        return self._supported(gpu.power_mw)

    def _supported(self, value: int | None) -> int:
        if self.lost:
            raise GpuIsLostError
        if value is None:
            raise NotSupportedError
        return value


FOUR = [StandInGpu(uuid=f"GPU-{i}{i}{i}{i}-bbbb") for i in range(4)]


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_counter_is_read_in_joules_and_power_where_there_is_none() -> None:
    nvml = StandInNvml(StandInGpu(), StandInGpu(name=b"Tesla P40", energy_mj=None, power_mw=51_250))
    meter = NvmlMeter(nvml, list_gpus(nvml))
    assert meter.read() == (GpuReading(energy_j=5000.0), GpuReading(power_w=51.25))
    source = find_energy("all", LOCAL, load=lambda: nvml)
    expected = "GPU 0 NVIDIA H100 80GB HBM3, GPU 1 Tesla P40 by NVML (energy counter or power)"
    assert source.described == expected


def test_errors_of_nvml_are_one_line() -> None:
    nvml = StandInNvml(StandInGpu())
    meter = NvmlMeter(nvml, list_gpus(nvml))
    nvml.lost = True
    with pytest.raises(EnergyError, match=r"^NVML: GPU is lost$"):
        meter.read()


def test_a_gpu_that_reports_neither_is_named() -> None:
    neither = StandInNvml(StandInGpu(), StandInGpu(energy_mj=None, power_mw=None))
    with pytest.raises(EnergyError, match=r"^GPU 1 \(NVIDIA H100 80GB HBM3\): Not Supported$"):
        NvmlMeter(neither, list_gpus(neither))
    assert find_energy((0,), LOCAL, load=lambda: neither).meter is not None


def test_without_the_package_or_the_driver_the_reason_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    source = find_energy(None, LOCAL)
    assert source.meter is None
    assert source.described == ("not measured: the package nvidia-ml-py is not installed (pip install nvidia-ml-py)")
    with pytest.raises(EnergyError, match=r"^energy cannot be measured: the package nvidia-ml-py .*\(--energy-gpus\)$"):
        find_energy((0,), LOCAL)
    monkeypatch.setitem(sys.modules, "pynvml", StandInNvml(has_driver=False))  # type: ignore[arg-type]
    assert find_energy(None, LOCAL).described == "not measured: NVML: NVML Shared Library Not Found"
    ready = StandInNvml(StandInGpu())
    monkeypatch.setitem(sys.modules, "pynvml", ready)  # type: ignore[arg-type]
    assert load_nvml() is ready


def never() -> Any:
    raise AssertionError("NVML was loaded")


def test_servers_whose_gpus_are_not_here() -> None:
    assert find_energy(None, REMOTE, load=never).described == "not measured: the server does not run on this machine"
    source = find_energy(None, LOCAL, "cpu (2 threads)", load=never)
    assert source.described == "not measured: the server computes on the CPU"
    assert find_energy((), LOCAL, load=never).described == "not measured: --energy-gpus none"
    assert find_energy("all", REMOTE, load=lambda: StandInNvml(*FOUR)).meter is not None  # the user knows better


def test_the_default_is_the_visible_gpus_or_those_of_the_servers_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(nvml: StandInNvml) -> list[str]:
        return find_energy(None, LOCAL, "cuda (NVIDIA H100)", load=lambda: nvml).described.split(" by ")[0].split(", ")

    nvml = StandInNvml(*FOUR)
    assert [words.split()[1] for words in numbers(nvml)] == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert [words.split()[1] for words in numbers(nvml)] == ["1", "3"]
    monkeypatch.setattr("bench.measurement.machine.MachineReader.server_pids", lambda _: frozenset({11, 12}))
    using = StandInNvml(*(StandInGpu(pids=[i, 9 + i]) for i in range(4)))
    assert [words.split()[1] for words in numbers(using)] == ["3"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2,0", [2, 0]),
        (" 1 ", [1]),
        ("GPU-2222,GPU-0000-bbbb", [2, 0]),
        ("0,-1,2", [0]),  # CUDA ignores what follows an invalid entry
        ("3,9", [3]),
    ],
)
def test_cuda_visible_devices(text: str, expected: list[int]) -> None:
    gpus = list_gpus(StandInNvml(*FOUR))
    assert [gpu.index for gpu in visible(gpus, {"CUDA_VISIBLE_DEVICES": text})] == expected


@pytest.mark.parametrize("text", ["", "-1", "MIG-1234", "GPU-"])
def test_cuda_visible_devices_without_a_whole_gpu(text: str) -> None:
    with pytest.raises(EnergyError, match="names no whole GPU"):
        visible(list_gpus(StandInNvml(*FOUR)), {"CUDA_VISIBLE_DEVICES": text})


def test_wanted_gpus_must_exist() -> None:
    with pytest.raises(EnergyError, match=r"there is no GPU 4; this machine has 4 \(--energy-gpus\)$"):
        find_energy((1, 4), LOCAL, load=lambda: StandInNvml(*FOUR))
    assert find_energy(None, LOCAL, load=StandInNvml).described == "not measured: NVML finds no GPU"


@pytest.mark.parametrize(("text", "expected"), [("all", "all"), ("None", ()), ("0", (0,)), ("3, 1,3", (3, 1))])
def test_gpus_in_text(text: str, expected: Any) -> None:
    assert parse_gpus(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "0-3", "1024", "9" * 5000])
def test_text_that_names_no_gpus(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_gpus(text)
