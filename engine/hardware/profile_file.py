"""The description that `redline profile` writes: from the fits to a file."""

from pathlib import Path

import msgspec

from engine.errors import ConfigError
from engine.hardware.description import (
    AllReduce,
    EngineDefaults,
    Hardware,
    Host,
    HostCosts,
    Peaks,
    Profiled,
    Quantity,
)
from engine.hardware.device_fit import SOURCE, DeviceFit

HEAD = """\
# Written by `redline profile`. Steps of small decoders with random weights were measured on this machine as its engine
# runs them, and the constants below fitted to their times; see docs/simulation/profile.md.
"""


def describe(
    device: DeviceFit, profiled: Profiled, defaults: EngineDefaults, *, title: str, memory_bytes: int
) -> Hardware:
    """The description of the device that was measured, but for the costs of its host, see `engine.hardware.host_fit`.

    Args:
        title: what the device is called.
        memory_bytes: free on the device before it was measured, which is what an engine takes its share of.
    """
    no_costs = HostCosts(SOURCE, step_ms=device.step_s * 1e3, request_us={1: 0}, serial=1, request_ms=0)
    sources = {
        SOURCE: f"redline profile {profiled.version}, {profiled.date}: median error {device.error:.1%} of the steps",
        "none": "Not measured: steps were those of one rank",
    }
    return Hardware(
        title=title,
        sources=sources,
        memory_gb=Quantity(memory_bytes / 1e9, SOURCE),
        bandwidth_tb_s=Quantity(device.bandwidth / 1e12, SOURCE),
        peak_tflops=Peaks(SOURCE, bf16=device.peak / 1e12),
        gemm=device.gemm,
        attention=device.attention,
        all_reduce=AllReduce("none", (1, 2), {}),
        layer=device.layer,
        host=Host(v1=no_costs, v0=no_costs),
        defaults=defaults,
        profiled=profiled,
    )


def write_description(path: Path, hardware: Hardware) -> None:
    """Write it, complete or not at all. Raises ConfigError if the file can't be written."""
    import yaml

    plain = msgspec.to_builtins(hardware)
    text = yaml.safe_dump(_rounded(_given(plain)), sort_keys=False, allow_unicode=True, width=120)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(HEAD + text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror} (--out)") from None


def _given(value: object) -> object:
    """Without fields that are None."""
    if isinstance(value, dict):
        return {key: _given(one) for key, one in value.items() if one is not None}
    return [_given(one) for one in value] if isinstance(value, list | tuple) else value


def _rounded(value: object) -> object:
    """Numbers with four digits, which is more than measurements have."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
