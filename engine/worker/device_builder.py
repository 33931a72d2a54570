"""Builds the runner of an asynchronous device: model, KV cache, slots."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.config import EngineConfig, ResolvedConfig
from engine.errors import ConfigError
from engine.model.loading.meta_model import MetaModel
from engine.model.loading.open_model import check_attention, kv_layout
from engine.model.model_info import ModelInfo
from engine.model.runtime.attention_interface import KVCache
from engine.worker.device import Device
from engine.worker.device_attention import GroupWindow, TorchAttention
from engine.worker.device_runner import DeviceRunner
from engine.worker.device_slots import DeviceSlots
from engine.worker.generic_device_backend import GenericDeviceBackend, move_model
from engine.worker.step_inputs import DeviceState, StepKernels


@dataclass(frozen=True, slots=True)
class BuiltDeviceRunner:
    """A runner and what the start table reports about it."""

    runner: DeviceRunner
    kernels: str
    warnings: tuple[str, ...] = ()


def build_device_runner(
    config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, meta_model: MetaModel, device: Device
) -> BuiltDeviceRunner:
    """Build a rank's runner in the thread that will run its steps; `model_info` is the rank's.

    Raises ConfigError for options that the device does not support, and ModelError if the model can't be run.
    """
    for flag, value in (("--quantization", config.quantization), ("--kv-cache-dtype", config.kv_cache_dtype)):
        if value is not None:
            raise ConfigError(f"{flag} {value} is only supported by the CPU kernels")
    with contextlib.closing(meta_model):
        meta_model.fill()
    uses = check_attention(meta_model, config, model_info)
    device.bind_thread()
    slots = DeviceSlots(
        resolved.max_num_seqs,
        resolved.max_model_len,
        resolved.block_size,
        resolved.draft_tokens,
        len(resolved.kv_windows),
    )
    with torch.inference_mode():
        runner = _build(model_info, resolved, meta_model, uses, device, slots)
    return BuiltDeviceRunner(runner, "torch")


def _build(
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    uses: Sequence[GroupWindow],
    device: Device,
    slots: DeviceSlots,
) -> DeviceRunner:
    move_model(meta_model.model, device.place)
    state = DeviceState(device, slots.layout)
    layout = kv_layout(model_info, resolved.block_size)
    cache = KVCache(model_info.kv_groups, resolved.num_blocks, layout, device.zeros)
    kernels = StepKernels()
    attention = TorchAttention(cache, uses, cache.keys[0].device)
    backend = GenericDeviceBackend(device, meta_model.model, attention, kernels, state.params, meta_model.vocab_shard)
    return DeviceRunner(device, backend, slots, state, kernels)
