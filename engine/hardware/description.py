"""Descriptions of named hardware, as data: `datasets/hardware/NAME.yaml`."""

import functools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from engine.data import datasets_folder
from engine.errors import ConfigError

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(gt=0)]
Fraction = Annotated[float, Meta(gt=0, le=1)]
NotNegative = Annotated[float, Meta(ge=0)]
DeviceKind = Literal["cpu", "cuda"]
THIS_MACHINE = "this-machine"  # the name of the description that `redline profile` writes


class Quantity(Struct, frozen=True, forbid_unknown_fields=True):
    """A number and the key of its source."""

    value: Positive
    source: str


class Peaks(Struct, frozen=True, forbid_unknown_fields=True):
    """Dense products, in 10^12 floating-point operations a second."""

    source: str
    bf16: Positive
    fp8: Positive | None = None
    fp4: Positive | None = None


class Gemm(Struct, frozen=True, forbid_unknown_fields=True):
    """How close matrix products come to the peak and to the bandwidth; see `engine.hardware.gemm`.

    `quantize_bytes` moves for each number of the input, to quantize it before the product.
    """

    launch_us: NotNegative
    compute: Fraction
    memory: Fraction
    sharpness: Annotated[float, Meta(ge=1)]
    half_depth: NotNegative
    quantize_bytes: NotNegative = 0.0


class GemmTable(Struct, frozen=True, forbid_unknown_fields=True):
    """Measured products: picoseconds for each weight, by the rows of activations, ascending."""

    rows: tuple[Count, ...]
    weight_ps: tuple[Positive, ...]


class Gemms(Struct, frozen=True, forbid_unknown_fields=True):
    """Products in bf16 have either a fit or a table."""

    source: str
    bf16: Gemm | None = None
    fp8: Gemm | None = None
    fp4: Gemm | None = None
    bf16_table: GemmTable | None = None


class DecodeAttention(Struct, frozen=True, forbid_unknown_fields=True):
    """`compute`: scores take this part of the bf16 peak besides the reads; None: no time. `request_us`: of each."""

    launch_us: NotNegative
    memory: Fraction
    compute: Positive | None = None
    request_us: NotNegative = 0


class DecodeAttentions(Struct, frozen=True, forbid_unknown_fields=True):
    """By the dtype of the KV cache."""

    bf16: DecodeAttention
    fp8: DecodeAttention | None = None


class TowerAttention(Struct, frozen=True, forbid_unknown_fields=True):
    """Parts of the bf16 peak, by the patches that attend to each other."""

    source: str
    patches: tuple[Count, ...]
    compute: tuple[Fraction, ...]


class Attention(Struct, frozen=True, forbid_unknown_fields=True):
    """`prompt` is a part of the bf16 peak. Without `tower`, vision towers have no times."""

    source: str
    decode: DecodeAttentions
    prompt: Fraction
    tower: TowerAttention | None = None


class AllReduce(Struct, frozen=True, forbid_unknown_fields=True):
    """Microseconds for a number of elements of two bytes, by the number of ranks."""

    source: str
    elements: tuple[Count, ...]
    ranks: dict[Count, tuple[Positive, ...]]


class Layer(Struct, frozen=True, forbid_unknown_fields=True):
    """What a layer's small kernels cost, and its launches in steps that aren't captured in a graph.

    `small_kernels_memory` is a part of the bandwidth; above 1 where activations stay in caches.
    """

    source: str
    small_kernels_us: NotNegative
    small_kernels_memory: Positive
    eager_us: NotNegative
    captured_tokens: Annotated[int, Meta(ge=0)]


class HostCosts(Struct, frozen=True, forbid_unknown_fields=True):
    """What the processes of an engine cost; `request_us` by the least number of ranks for which it holds.

    `admitted_ms`: by which each new request delays the step that begins it, where the processes run on the device's
    cores.
    """

    source: str
    step_ms: NotNegative
    request_us: dict[Count, NotNegative]
    serial: Annotated[float, Meta(ge=0, le=1)]
    request_ms: NotNegative
    admitted_ms: NotNegative = 0

    def step_seconds(self, requests: int, ranks: int) -> float:
        """The host's time of a step."""
        each = self.request_us[max(least for least in self.request_us if least <= ranks)]
        return self.step_ms * 1e-3 + each * 1e-6 * requests


class Processing(Struct, frozen=True, forbid_unknown_fields=True):
    """CPU time of an image from its file to the tower's input: it is decoded, resized and divided into patches."""

    source: str
    megapixel_ms: NotNegative


class Host(Struct, frozen=True, forbid_unknown_fields=True):
    """Without `processing`, the images of requests take no time before the engine."""

    v1: HostCosts
    v0: HostCosts
    processing: Processing | None = None

    def of(self, engine: str | None) -> HostCosts:
        """The costs of an engine: v1, v0, or None for the default, v1."""
        return self.v0 if engine == "v0" else self.v1


class EngineDefaults(Struct, frozen=True, forbid_unknown_fields=True):
    """Values of options that the engine on this device has; see `engine.devices.machine.Defaults`."""

    max_num_seqs: Count
    max_num_batched_tokens: Count
    min_chunk: Count
    block_size: Count
    memory_utilization: Fraction


class Profiled(Struct, frozen=True, forbid_unknown_fields=True):
    """Where and when `redline profile` measured a description.

    processor, threads: of the host. busy: the share of the cores that others used, 0..1. device: what ran the steps.
    """

    processor: str
    threads: int
    kernels: str
    date: str
    version: str
    busy: NotNegative
    device: DeviceKind = "cpu"


class Hardware(Struct, frozen=True, forbid_unknown_fields=True):
    """One device, and the host of its engine. defaults: None: those of an engine on a GPU."""

    title: str
    sources: dict[str, str]
    memory_gb: Quantity
    bandwidth_tb_s: Quantity
    peak_tflops: Peaks
    gemm: Gemms
    attention: Attention
    all_reduce: AllReduce
    layer: Layer
    host: Host
    defaults: EngineDefaults | None = None
    profiled: Profiled | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_tb_s.value * 1e12

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb.value * 1e9)

    @property
    def is_cpu(self) -> bool:
        """Whether the steps run on the cores of the host, which the processes of all engines share."""
        return self.profiled is not None and self.profiled.device == "cpu"


def hardware_names() -> list[str]:
    """The hardware whose descriptions ship with the product."""
    return sorted(path.stem for path in (datasets_folder() / "hardware").glob("*.yaml"))


def profile_file() -> Path:
    """The description of this machine in the user's cache, which `redline profile` writes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "redline" / "hardware" / f"{THIS_MACHINE}.yaml"


def description_path(name: str) -> Path:
    """The file of a description: its name may itself be a path that ends in .yaml."""
    if name == THIS_MACHINE:
        return profile_file()
    return Path(name) if name.endswith(".yaml") else datasets_folder() / "hardware" / f"{name}.yaml"


def is_described(name: str) -> bool:
    """Whether the file of a description exists."""
    return os.path.isfile(description_path(name))  # unlike Path.is_file, also of names that no file can have


def read_hardware(name: str) -> Hardware:
    """Read a description by its name, or from a file whose name ends in .yaml. Raises ConfigError."""
    path = description_path(name)
    if name == THIS_MACHINE and not is_described(name):
        raise ConfigError(f"--device sim:{name}: this machine hasn't been measured yet: run `redline profile` first")
    if not is_described(name):
        raise ConfigError(
            f"--device sim:{name}: no such hardware; known are {', '.join((*hardware_names(), THIS_MACHINE))}, or the "
            "path of a description that ends in .yaml"
        )
    return _read(name, path, path.stat().st_mtime_ns)


@functools.cache
def _read(name: str, path: Path, _changed_ns: int) -> Hardware:
    import yaml

    try:
        found: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        hardware = msgspec.convert(found, Hardware)
    except OSError as error:
        raise ConfigError(f"--device sim:{name}: {path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"--device sim:{name}: {path.name} is not a hardware description: {error}") from error
    _check(hardware, path.name)
    return hardware


def _check(hardware: Hardware, file: str) -> None:
    """Raise ConfigError where values don't fit each other."""
    table, host = hardware.all_reduce, hardware.host
    products = hardware.gemm.bf16_table
    if (products is None) == (hardware.gemm.bf16 is None):
        raise ConfigError(f"{file}: gemm needs either bf16 or bf16_table")
    if products is not None and (not products.rows or len(products.rows) != len(products.weight_ps)):
        raise ConfigError(f"{file}: gemm.bf16_table needs one weight_ps for each of its rows, and at least one")
    if products is not None and list(products.rows) != sorted(set(products.rows)):
        raise ConfigError(f"{file}: gemm.bf16_table.rows must be in ascending order")
    parts = (hardware.memory_gb, hardware.bandwidth_tb_s, hardware.peak_tflops, hardware.gemm, hardware.attention)
    tower = hardware.attention.tower
    for part in (*parts, table, hardware.layer, host.v1, host.v0, tower, host.processing):
        if part is not None and part.source not in hardware.sources:
            raise ConfigError(f"{file}: sources has no {part.source}")
    if list(table.elements) != sorted(set(table.elements)) or len(table.elements) < 2:
        raise ConfigError(f"{file}: all_reduce.elements must be two or more numbers in ascending order")
    for ranks, times in table.ranks.items():
        if len(times) != len(table.elements):
            raise ConfigError(f"{file}: all_reduce.ranks.{ranks} needs {len(table.elements)} times, one for each size")
    for version in ("v1", "v0"):
        if 1 not in getattr(hardware.host, version).request_us:
            raise ConfigError(f"{file}: host.{version}.request_us needs a value for 1 rank")
    if tower is not None:
        _check_tower(tower, file)


def _check_tower(tower: TowerAttention, file: str) -> None:
    if not tower.patches or list(tower.patches) != sorted(set(tower.patches)):
        raise ConfigError(f"{file}: attention.tower.patches must be one or more numbers in ascending order")
    if len(tower.patches) != len(tower.compute):
        raise ConfigError(f"{file}: attention.tower needs compute for each of its patches")
