"""What other engines do differently on the same hardware, as data: `tests/perf/engines/NAME.yaml`.

A description of hardware has the times of V1. Published measurements are of other engines too, whose kernels and
processes cost less or more; with these files the latency model is checked against them.
"""

import functools
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from engine.errors import ConfigError
from engine.hardware.description import AllReduce, Gemm, Hardware, HostCosts, NotNegative, Positive

FOLDER = Path(__file__).parent / "engines"


class Kernels(Struct, frozen=True, forbid_unknown_fields=True):
    """An engine's kernels: those without a unit are factors on the hardware's numbers.

    quantized_launch, quantized_compute: of products in fp8 and fp4. quantize_bytes: see `Gemm`. fp8_kv: of the part of
    the bandwidth that decodes reach with a KV cache in fp8.
    """

    source: str
    small_kernels_us: NotNegative
    quantized_launch: Positive = 1.0
    quantized_compute: Positive = 1.0
    quantize_bytes: NotNegative | None = None
    fp8_kv: Positive = 1.0
    all_reduce: Positive = 1.0


class OtherEngine(Struct, frozen=True, forbid_unknown_fields=True):
    """Another engine. With `whole_requests`, one runs only when the KV cache has room for its whole output."""

    title: str
    sources: dict[str, str]
    host: HostCosts
    kernels: Kernels
    ablations: tuple[str, ...] = ()
    whole_requests: bool = False

    def on(self, hardware: Hardware) -> Hardware:
        """The hardware with the times of this engine."""
        kernels, gemm, decode = self.kernels, hardware.gemm, hardware.attention.decode
        fp8 = decode.fp8 and replace(decode.fp8, memory=min(decode.fp8.memory * kernels.fp8_kv, 1.0))
        sources = hardware.sources | self.sources
        return replace(
            hardware,
            sources=sources,
            gemm=replace(gemm, fp8=self._quantized(gemm.fp8), fp4=self._quantized(gemm.fp4)),
            attention=replace(hardware.attention, decode=replace(decode, fp8=fp8)),
            all_reduce=self._all_reduce(hardware.all_reduce),
            layer=replace(hardware.layer, small_kernels_us=kernels.small_kernels_us),
            host=replace(hardware.host, v1=self.host),
        )

    def _quantized(self, gemm: Gemm | None) -> Gemm | None:
        if gemm is None:
            return None
        kernels = self.kernels
        return replace(
            gemm,
            launch_us=gemm.launch_us * kernels.quantized_launch,
            compute=min(gemm.compute * kernels.quantized_compute, 1.0),
            quantize_bytes=gemm.quantize_bytes if kernels.quantize_bytes is None else kernels.quantize_bytes,
        )

    def _all_reduce(self, table: AllReduce) -> AllReduce:
        ranks = {ranks: tuple(self.kernels.all_reduce * one for one in times) for ranks, times in table.ranks.items()}
        return replace(table, ranks=ranks)


def engine_names() -> list[str]:
    """The other engines that are known."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@functools.cache
def read_engine(name: str) -> OtherEngine:
    """Raises ConfigError for an engine that isn't known, and for a file that doesn't describe one."""
    path = FOLDER / f"{name}.yaml"
    if name not in engine_names():
        raise ConfigError(f"no engine {name} is known; known are v1, v0, {', '.join(engine_names())}")
    import yaml

    try:
        engine = msgspec.convert(yaml.safe_load(path.read_text()), OtherEngine)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path.name} does not describe an engine: {error}") from error
    for part in (engine.host, engine.kernels):
        if part.source not in engine.sources:
            raise ConfigError(f"{path.name}: sources has no {part.source}")
    return engine
