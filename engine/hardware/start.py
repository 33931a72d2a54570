"""Makes the executor of a configuration on simulated hardware."""

import dataclasses
import json
from typing import Any

from msgspec import structs

from engine.clock import Clock
from engine.config import EngineConfig
from engine.hardware.description import Hardware, read_hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.shape import decoder_shape
from engine.hardware.step_time import StepTime
from engine.hardware.towers import TowerShape, tower_shape
from engine.model.config.file_names import CONFIG
from engine.model.model_info import ModelInfo
from engine.resolved_config import ResolvedConfig

SYNCHRONOUS = {"no-run-ahead", "full-state"}  # ablations with which the device waits for the host (engine.core.policy)


def simulated_executor(
    config: EngineConfig, resolved: ResolvedConfig, model_info: ModelInfo, clock: Clock
) -> SimulatedExecutor:
    """The executor of one replica; the caller delivers its results (`SimulatedExecutor.pump`).

    Raises ConfigError if the hardware has no times for the model or for this number of ranks.
    """
    hardware, ranks = used_hardware(config), config.tensor_parallel_size
    host = SimulatedHost(hardware.host.of(config.engine), ranks, overlaps=not resolved.ablations & SYNCHRONOUS)
    step_time = StepTime(hardware, decoder_shape(config, model_info), ranks, _tower(model_info))
    sizes = resolved.max_num_seqs, model_info.vocab_size
    return SimulatedExecutor(clock, step_time, host, *sizes, config.simulated_tokens)


def _tower(model_info: ModelInfo) -> TowerShape | None:
    return None if model_info.mm is None else tower_shape(config_fields(model_info))


def config_fields(model_info: ModelInfo) -> dict[str, Any]:
    """The fields of the model's config.json."""
    path = model_info.path
    fields: dict[str, Any] = json.loads((path if path.is_file() else path / CONFIG).read_text())
    return fields


def used_hardware(config: EngineConfig) -> Hardware:
    """The hardware as a configuration uses it."""
    hardware = read_hardware(config.simulated)
    if config.enforce_eager:
        return structs.replace(hardware, layer=structs.replace(hardware.layer, captured_tokens=0))
    return hardware


def with_short_messages(resolved: ResolvedConfig) -> ResolvedConfig:
    """The same engine without `full-state`: what its long messages cost is among the host's costs of the hardware.

    The scheduler does the same with `no-run-ahead`, and the simulation takes a fifth of the time.
    """
    if "full-state" not in resolved.ablations:
        return resolved
    return dataclasses.replace(resolved, ablations=resolved.ablations - {"full-state"} | {"no-run-ahead"})
