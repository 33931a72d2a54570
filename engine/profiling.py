"""Measures this machine: steps of small decoders with random weights, to which a hardware description is fitted."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import psutil

from engine.config import EngineConfig
from engine.devices import machine_for
from engine.devices.cpu import CpuMachine
from engine.devices.cuda import CudaMachine
from engine.errors import ConfigError
from engine.hardware.description import DeviceKind, EngineDefaults
from engine.hardware.device_fit import DeviceFit, MeasuredStep, fit_device
from engine.hardware.step_time import DecoderShape
from engine.host import cores, processor
from engine.worker.step_meter import Composition, StepMeter

SPEED_REQUESTS, SPEED_STEPS = 8, 24  # of the steps that tell the device's speed
Show = Callable[[int, int, str], None]  # rounds done, rounds in all, what is measured


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured.

    shapes: they differ in size, in layers, and in query heads for each KV head. rows: of the table of products.
    rounds: in each, every step of every shape is measured `repeats` times, so that a disturbance hits all alike.
    """

    shapes: tuple[DecoderShape, ...]
    rows: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]  # requests, context
    chunks: tuple[tuple[int, int], ...]  # tokens, tokens before them
    mixed: tuple[tuple[int, int, int, int], ...]  # both
    rounds: int
    repeats: int

    @property
    def compositions(self) -> list[Composition]:
        return [
            *(Composition(count, context) for count, context in self.decodes),
            *(Composition(chunks=(chunk,)) for chunk in self.chunks),
            *(Composition(count, context, ((tokens, before),)) for count, context, tokens, before in self.mixed),
        ]


# The weights of each shape are larger than the caches of most processors, as those of real models are. The first two
# have as many in different numbers of layers, which tells the cost of a layer from that of its weights; the third one
# has half of them, which tells the cost of a step.
CPU_GRID = Grid(
    shapes=(
        DecoderShape(24, 576, 1536, 9, 3, 64, 49152),
        DecoderShape(2, 2048, 8192, 32, 8, 64, 8192),
        DecoderShape(3, 896, 4864, 14, 2, 64, 16384),
    ),
    rows=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512),
    decodes=(
        *((count, 40) for count in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)),
        (1, 1500), (4, 500), (4, 1500), (16, 256), (16, 1000), (32, 500), (64, 256),
    ),
    chunks=(
        (16, 0), (32, 0), (64, 0), (96, 0), (128, 0), (192, 0), (256, 0), (512, 0), (16, 1000), (128, 500), (128, 1500),
    ),
    mixed=((4, 128, 60, 0), (16, 128, 112, 0), (16, 128, 112, 500), (48, 128, 80, 200)),
    rounds=5,
    repeats=2,
)  # fmt: skip
GPU_GRID = Grid(
    shapes=(
        DecoderShape(8, 2048, 8192, 32, 8, 64, 128256),
        DecoderShape(4, 4096, 14336, 32, 8, 128, 128256),
        DecoderShape(4, 3584, 18944, 28, 4, 128, 152064),
    ),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    decodes=(
        *((count, 64) for count in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
        (1, 8000), (16, 4000), (64, 1000), (64, 4000), (256, 1000),
    ),
    chunks=(
        *((tokens, 0) for tokens in (64, 128, 256, 512, 1024, 2048, 4096, 8192)), (512, 7000), (2048, 4000),
    ),
    mixed=((64, 500, 448, 0), (64, 500, 1984, 0), (128, 500, 8064, 0)),
    rounds=5,
    repeats=3,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class MeasuredDevice:
    """What was found. defaults: of the engine's options on it."""

    fit: DeviceFit
    steps: list[MeasuredStep]
    kernels: str
    defaults: EngineDefaults


@dataclass(frozen=True, slots=True)
class ProfiledDevice:
    """What is measured. memory_bytes: free before anything runs on it."""

    kind: DeviceKind
    title: str
    memory_bytes: int
    grid: Grid


def find_device(device: str) -> ProfiledDevice:
    """The device of a type, or of `auto`. Raises ConfigError if there is none that can be measured."""
    options: dict[str, Any] = {"device": device}
    machine = machine_for(EngineConfig(model="profile", **options))
    if isinstance(machine, CudaMachine):
        return ProfiledDevice("cuda", machine.gpu, machine.available_memory(), GPU_GRID)
    if isinstance(machine, CpuMachine):
        return ProfiledDevice("cpu", f"{processor()}, {cores()} threads", machine.available_memory(), CPU_GRID)
    raise ConfigError(f"--device {device} can't be profiled: use cpu or cuda")


def measure_device(grid: Grid, show: Show, options: dict[str, Any] | None = None) -> MeasuredDevice:
    """Measure and fit. Raises RedlineError if the shapes can't be run here.

    Args:
        options: fields of EngineConfig, such as `device`.
    """
    times: dict[tuple[DecoderShape, Composition], list[float]] = defaultdict(list)
    total = len(grid.shapes) * grid.rounds
    with ExitStack() as stack:
        show(0, total, "starting")
        meters = [
            stack.enter_context(StepMeter(shape, grid.compositions, grid.repeats, options)) for shape in grid.shapes
        ]
        for number, meter in enumerate(meters * grid.rounds):
            show(number, total, f"{meter.shape.num_layers} layers of {meter.shape.hidden_size}")
            for composition in grid.compositions:
                times[meter.shape, composition] += meter.seconds(composition, grid.repeats)
        show(total, total, "done")
    steps = [MeasuredStep(shape, one.work(grid.repeats // 2), median(found)) for (shape, one), found in times.items()]
    defaults = EngineDefaults(**asdict(meters[0].defaults))
    return MeasuredDevice(fit_device(steps, grid.rows), steps, meters[0].kernels, defaults)


class OtherLoad:
    """The share of the usable cores that other processes and the hypervisor's other guests have used since it was made.

    Processes that this one started are its own, once they have ended and been waited for.
    """

    def __init__(self) -> None:
        self._before = _core_seconds()

    def share(self) -> float:
        at, busy, own = (now - before for now, before in zip(_core_seconds(), self._before, strict=True))
        return min(max(busy - own, 0.0) / max(at, 1e-9), 1.0)


def _core_seconds() -> tuple[float, float, float]:
    """Seconds of the usable cores so far: passed, used by anybody, used by this process and its children."""
    usable, own = _usable_times(), os.times()
    used = sum(cpu.user + cpu.system + getattr(cpu, "nice", 0.0) + getattr(cpu, "steal", 0.0) for cpu in usable)
    own_s = own.user + own.system + own.children_user + own.children_system
    return time.monotonic() * len(usable), used, own_s


def _usable_times() -> list[Any]:
    """The times of the cores on which this process may run; of all where the system has no affinity."""
    times: list[Any] = psutil.cpu_times(percpu=True)
    if not hasattr(os, "sched_getaffinity"):
        return times
    return [times[core] for core in sorted(os.sched_getaffinity(0)) if core < len(times)]


class SpeedMeter(StepMeter):
    """The device's speed at any time, from one kind of step; `folder` is for a server of the same model.

    Args:
        grid: its first shape is used.
        measured: with what the grid's steps took.
    """

    def __init__(self, grid: Grid, measured: MeasuredDevice, options: dict[str, Any] | None = None):
        self._composition = next(one for one in grid.compositions if one.decodes == SPEED_REQUESTS)
        work = self._composition.work(grid.repeats // 2)
        self.described_s = next(
            one.seconds for one in measured.steps if one.shape == grid.shapes[0] and one.work == work
        )
        super().__init__(grid.shapes[0], [self._composition], SPEED_STEPS, options)

    def speed(self) -> float:
        """1 as it was measured, more if it is faster."""
        return self.described_s / median(self.seconds(self._composition, SPEED_STEPS))

    @property
    def tokens_per_s(self) -> float:
        """Of SPEED_REQUESTS requests that decode."""
        return SPEED_REQUESTS / self.described_s
