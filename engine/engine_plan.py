"""Plans an engine: its device, what must be known of its model, its memory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.config import SIMULATED, EngineConfig
from engine.devices import machine_for, model_info_for
from engine.devices.machine import Machine
from engine.errors import ConfigError, OutOfMemoryError
from engine.hardware.description import hardware_names
from engine.length import fit_length
from engine.memory import Resolution, resolve
from engine.model.model_info import ModelInfo

MOST_RANKS = 16


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """A configuration with a length in place of `auto`, and what follows from it."""

    config: EngineConfig
    model_info: ModelInfo
    resolution: Resolution


def plan_engine(config: EngineConfig, memory: int | None = None, machine: Machine | None = None) -> EnginePlan:
    """Plan one replica.

    Args:
        memory: bytes that the replica may use; None: its share of what is free now.
        machine: that it runs on; None: that of `--device`.

    Raises ConfigError for options that the device doesn't have, ModelError for a model that can't be read,
    OutOfMemoryError if one request of max-model-len does not fit; the messages have what works.
    """
    try:
        return _plan(config, memory, machine)
    except OutOfMemoryError as error:
        others = [*_more_ranks(config), *_larger_hardware(config)] if config.simulated else []
        if not others:
            raise
        raise OutOfMemoryError(f"{error}, or {' or '.join(others)}") from error


def _plan(config: EngineConfig, memory: int | None, machine: Machine | None = None) -> EnginePlan:
    machine = machine or machine_for(config)  # first: its errors need no model
    config, memory = fit_length(machine.adapt(config), memory, machine)
    model_info = model_info_for(config)
    return EnginePlan(config, model_info, resolve(config, model_info, memory, machine))


def _more_ranks(config: EngineConfig) -> Iterator[str]:
    """The least number of ranks with which a configuration fits on simulated hardware."""
    ranks = config.tensor_parallel_size * 2
    while ranks <= MOST_RANKS:
        if _fits(replace(config, tensor_parallel_size=ranks)):
            yield f"--tp {ranks}"
            return
        ranks *= 2


def _larger_hardware(config: EngineConfig) -> Iterator[str]:
    """The hardware on which a configuration fits."""
    for name in hardware_names():
        if _fits(replace(config, device=f"{SIMULATED}{name}")):
            yield f"--device {SIMULATED}{name}"


def _fits(config: EngineConfig) -> bool:
    with contextlib.suppress(ConfigError, OutOfMemoryError):
        _plan(config, None)
        return True
    return False
