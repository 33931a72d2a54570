"""Builds the runner of an asynchronous device: model, KV cache, slots."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.config import EngineConfig, ResolvedConfig
from engine.devices.machine import refuse_quantized
from engine.errors import ConfigError
from engine.model.loading.meta_model import Allocate, MetaModel
from engine.model.loading.open_model import check_attention, kv_layout
from engine.model.model_info import ITEMSIZE, ModelInfo
from engine.model.runtime.attention_interface import KVCache, lazy_zeros
from engine.model.runtime.vocab_shard import VocabShard
from engine.model.sharding.tp_plan import TPPlan
from engine.worker.adapter_manager import adapter_sharding
from engine.worker.device import Device
from engine.worker.device_attention import Attention, GroupWindow, TorchAttention
from engine.worker.device_runner import DeviceRunner
from engine.worker.device_slots import DeviceSlots
from engine.worker.generic_device_backend import GenericDeviceBackend, move_buffers
from engine.worker.linear_products import PLAIN, LinearFormats, quantize_linears
from engine.worker.step_inputs import DeviceState, StepKernels

if TYPE_CHECKING:
    from engine.worker.triton_backend import TritonAttention


@dataclass(frozen=True, slots=True)
class BuiltDeviceRunner:
    """A runner and what the start table reports about it."""

    runner: DeviceRunner
    kernels: str
    warnings: tuple[str, ...] = ()


def build_device_runner(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    device: Device,
    tp_plan: TPPlan | None = None,
    *,
    use_triton: bool = False,
) -> BuiltDeviceRunner:
    """Build a rank's runner in the thread that will run its steps.

    Raises ConfigError for options that the device does not support, and ModelError if the model can't be run.

    Args:
        model_info: of the rank.
        meta_model: the rank's shard of the model.
        tp_plan: how ranks divide the model; None with one rank.
        use_triton: whether attention, sampling and the state of slots use the kernels in Triton; else those in torch.
    """
    _check_formats(config, model_info, use_triton)
    if not use_triton:
        runner = _build_generic(config, model_info, resolved, meta_model, device, tp_plan, False)
        return BuiltDeviceRunner(runner, "torch")
    from engine.kernels.triton.limits import attention_refusal
    from engine.worker import triton_stack

    shape = model_info.num_heads, model_info.num_kv_heads, model_info.head_dim
    refusal = attention_refusal(*shape)
    if refusal is not None:
        if config.kernels == "triton":
            raise ConfigError(f"--kernels triton does not run this model ({refusal}): use --kernels torch")
        refuse_quantized(config, refusal)
        runner = _build_generic(config, model_info, resolved, meta_model, device, tp_plan, False)
        return BuiltDeviceRunner(runner, f"torch ({refusal})")
    refusal = triton_stack.refusal(meta_model.model)
    if refusal is None:
        runner = _build_stack(config, model_info, resolved, meta_model, device, tp_plan)
        return BuiltDeviceRunner(runner, "triton, fused stack")
    runner = _build_generic(config, model_info, resolved, meta_model, device, tp_plan, True)
    return BuiltDeviceRunner(runner, f"triton ({refusal})")


def _check_formats(config: EngineConfig, model_info: ModelInfo, use_triton: bool) -> None:
    if not use_triton:
        refuse_quantized(config, "this device does not use them")
    if config.quantization == "fp8" and model_info.dtype != "bfloat16":
        raise ConfigError(f"--quantization fp8 needs --dtype bfloat16, not {model_info.dtype}")


def _build_stack(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    device: Device,
    tp_plan: TPPlan | None,
) -> DeviceRunner:
    from engine.worker.stack_ranks import make_stack_ranks
    from engine.worker.triton_stack import make_stack
    from engine.worker.triton_stack_backend import TritonStackBackend

    groups = model_info.kv_groups
    positions = resolved.max_model_len + resolved.draft_tokens
    device.bind_thread()
    with contextlib.closing(meta_model):
        meta_model.use(device.weight_memory())
        formats = _linear_formats(config, model_info, meta_model, device)
        stack = make_stack(meta_model.model, groups, positions, device.place, meta_model.fill, formats)
    with torch.inference_mode():
        slots, state, cache = _allocate(config, model_info, resolved, device)
        uses = [(group, window or None) for group, window in enumerate(groups.windows)]
        kernels, attention = _triton_parts(model_info, resolved, cache, uses, state, meta_model.vocab_shard)
        ranks = make_stack_ranks(meta_model.vocab_shard)
        backend = TritonStackBackend(device, stack, attention, kernels, state.parameters, meta_model.model, ranks)
        return DeviceRunner(device, backend, slots, state, kernels, adapter_sharding(meta_model, tp_plan))


def _build_generic(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    device: Device,
    tp_plan: TPPlan | None,
    use_triton: bool,
) -> DeviceRunner:
    # What the check needs of the weights is only their shapes.
    with meta_model.zeros(cached_zeros()):
        uses = check_attention(meta_model, config, model_info)
    device.bind_thread()
    with torch.inference_mode():
        move_buffers(meta_model.model, device.place)
        with contextlib.closing(meta_model):
            meta_model.use(device.weight_memory())
            formats = _linear_formats(config, model_info, meta_model, device)
            quantize_linears(meta_model.model, formats, meta_model.fill)
            meta_model.fill()
        slots, state, cache = _allocate(config, model_info, resolved, device)
        kernels, attention = _attention(model_info, resolved, cache, uses, state, meta_model.vocab_shard, use_triton)
        backend = GenericDeviceBackend(
            device, meta_model.model, attention, kernels, state.parameters, meta_model.vocab_shard
        )
        return DeviceRunner(device, backend, slots, state, kernels, adapter_sharding(meta_model, tp_plan))


def cached_zeros() -> Allocate:
    """A function that returns the same zeros for the same shape and dtype: a whole model takes little memory."""
    return functools.cache(lazy_zeros)


def _linear_formats(
    config: EngineConfig, model_info: ModelInfo, meta_model: MetaModel, device: Device
) -> LinearFormats:
    """The forms of the linears' weights. Raises ConfigError if the model's can't have them."""
    if config.quantization is None:
        return PLAIN
    from engine.worker.triton_products import quantized_formats

    formats = quantized_formats(config.quantization, getattr(torch, model_info.dtype), device)
    reason = formats.refusal(meta_model.model)
    if reason is not None:
        raise ConfigError(f"--quantization {config.quantization}: {reason}")
    return formats


def _stored_cache(kv_cache_dtype: str | None, device: Device) -> torch.dtype | None:
    """The dtype of 8 bits that stores keys and values; None: that of the model."""
    if kv_cache_dtype == "fp8" and not device.converts_fp8:
        return torch.uint8
    return {None: None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_cache_dtype]


def _allocate(
    config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, device: Device
) -> tuple[DeviceSlots, DeviceState, KVCache]:
    rows, groups = resolved.max_num_seqs, len(resolved.kv_windows)
    slots = DeviceSlots(rows, resolved.max_model_len, resolved.block_size, resolved.draft_tokens, groups)
    state = DeviceState(device, slots.layout)
    layout = kv_layout(model_info, resolved.block_size)
    stored = _stored_cache(config.kv_cache_dtype, device)
    return slots, state, KVCache(model_info.kv_groups, resolved.num_blocks, layout, device.zeros, stored)


def _attention(
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    cache: KVCache,
    uses: Sequence[GroupWindow],
    state: DeviceState,
    vocab_shard: VocabShard | None,
    use_triton: bool,
) -> tuple[StepKernels, Attention]:
    if use_triton:
        return _triton_parts(model_info, resolved, cache, uses, state, vocab_shard)
    kernels = StepKernels() if vocab_shard is None else StepKernels().sharded(vocab_shard.gather)
    return kernels, TorchAttention(cache, uses, cache.keys[0].device)


def _triton_parts(
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    cache: KVCache,
    uses: Sequence[GroupWindow],
    state: DeviceState,
    vocab_shard: VocabShard | None,
) -> tuple[StepKernels, "TritonAttention"]:
    from engine.kernels.triton.attention import AttentionShape
    from engine.worker.triton_backend import (
        TritonAttention,
        default_tilings,
        sharded_step_kernels,
        triton_step_kernels,
    )

    layout = cache.layout
    shape = AttentionShape(model_info.num_heads, layout.kv_heads, layout.head_dim, layout.block_size)
    quantized = cache.keys[0].dtype.itemsize == 1
    tilings = default_tilings(
        shape, ITEMSIZE[model_info.dtype], quantized=quantized, tile_table=resolved.tile_table
    )  # fmt: skip
    sampled = resolved.max_num_seqs * (1 + resolved.draft_tokens)
    # Every running request computes a token, and draft tokens besides.
    tokens = max(resolved.max_num_batched_tokens, sampled)
    if vocab_shard is None:
        kernels = triton_step_kernels(sampled, model_info.vocab_size, state.words.device)
    else:
        kernels = sharded_step_kernels(sampled, vocab_shard, state.words.device)
    return kernels, TritonAttention(cache, uses, state.tables, shape, tilings, tokens)
