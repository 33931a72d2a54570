"""The description that `redline profile` writes: from the fits to a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
from msgspec.structs import replace

from engine.errors import ConfigError
from engine.hardware.arrivals import ArrivingRequest, median_first_token
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
from engine.hardware.least_squares import nonnegative_least_squares
from engine.hardware.step_time import DecoderShape

HEAD = """\
# Written by `redline profile`. Steps of small decoders with random weights were measured on this machine as its engine
# runs them, and the constants below fitted to their times; see docs/simulation/profile.md.
"""


@dataclass(frozen=True, slots=True)
class MeasuredArrivals:
    """Requests by time, and the median time to the first token of those of one token, in seconds."""

    requests: Sequence[ArrivingRequest]
    first_token: float


def fit_host(steps: Mapping[int, float], first_token: float, step_s: float) -> HostCosts:
    """The costs of an engine's processes on the cores of its device, so that all of them delay its steps.

    Args:
        steps: seconds beside the device's, by the number of requests of a step.
        first_token: the same of a request that comes alone, until its first token.
        step_s: seconds of the device's steps that its description leaves to the host.
    """
    counts = np.array(list(steps), float)
    fixed, each = nonnegative_least_squares(
        np.stack((np.ones_like(counts), counts), 1), np.maximum(np.array(list(steps.values())), 0.0)
    )
    return HostCosts(
        SOURCE,
        step_ms=float((fixed + step_s) * 1e3),
        request_us={1: float(each * 1e6)},
        serial=1,
        request_ms=0,
        admitted_ms=float(max(first_token - fixed - each, 0.0) * 1e3),
    )


def with_request_latency(
    hardware: Hardware, shape: DecoderShape, engine: str, measured: Sequence[MeasuredArrivals]
) -> Hardware:
    """The description with the time of a request from its sending to the core, while the cores are busy.

    It is what measured first tokens take longer than those of the description without it. Such a request waits for
    cores in each process on its way, which it doesn't when it comes alone.

    Args:
        hardware: with a `request_ms` of 0.
        engine: v1 or v0.
    """
    late = median(one.first_token - median_first_token(hardware, shape, engine, one.requests) for one in measured)
    costs = replace(getattr(hardware.host, engine), request_ms=max(late, 0.0) * 1e3)
    return replace(hardware, host=replace(hardware.host, **{engine: costs}))


def describe(
    device: DeviceFit,
    hosts: Mapping[str, HostCosts],
    profiled: Profiled,
    defaults: EngineDefaults,
    *,
    title: str,
    memory_bytes: int,
) -> Hardware:
    """The description of the device that was measured.

    Args:
        hosts: by engine, v1 and v0.
        title: what the device is called.
        memory_bytes: free on the device before it was measured, which is what an engine takes its share of.
    """
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
        host=Host(v1=hosts["v1"], v0=hosts["v0"]),
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
