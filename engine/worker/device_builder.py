"""Builds the runner of an asynchronous device: model, KV cache, slots."""

import contextlib
import functools
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.devices.machine import refuse_quantized
from engine.errors import ConfigError
from engine.messages import MemoryLine
from engine.model.loading.meta_model import Allocate, MetaModel
from engine.model.loading.open_model import check_attention
from engine.model.model_info import ModelInfo
from engine.model.runtime.attention_interface import lazy_zeros
from engine.model.sharding.tp_plan import TPPlan
from engine.multimodal.families import MM_FAMILIES
from engine.resolved_config import ResolvedConfig
from engine.worker.adapter_manager import adapter_sharding
from engine.worker.device import Device
from engine.worker.device_assembly import Assembly, BackendParts, LoadedModel
from engine.worker.device_memory import build_measured
from engine.worker.device_runner import DeviceRunner
from engine.worker.generic_device_backend import GenericDeviceBackend, move_buffers
from engine.worker.linear_products import PLAIN, LinearFormats, quantize_linears
from engine.worker.mm_generic_device_backend import MMGenericDeviceBackend


@dataclass(frozen=True, slots=True)
class BuiltDeviceRunner:
    """A runner and what the start table reports about it."""

    runner: DeviceRunner
    kernels: str
    warnings: tuple[str, ...] = ()
    num_blocks: int | None = None  # of the KV cache, if not as planned
    memory: tuple[MemoryLine, ...] = ()  # as measured


def build_device_runner(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    device: Device,
    tp_plan: TPPlan | None = None,
    *,
    use_triton: bool = False,
    memory_utilization: float | None = None,
) -> BuiltDeviceRunner:
    """Build a rank's runner in the thread that will run its steps.

    Raises ConfigError for options that the device does not support, and ModelError if the model can't be run.

    Args:
        model_info: of the rank.
        meta_model: the rank's shard of the model.
        tp_plan: how ranks divide the model; None with one rank.
        use_triton: whether attention, sampling and the state of slots use the kernels in Triton; else those in torch.
        memory_utilization: share of the device's memory that may be used, where the number of KV blocks is chosen by
            measuring; None: as planned.
    """
    _check_formats(config, model_info, use_triton)
    _check_inputs(config, meta_model)
    model, kernels, use_triton = _load(config, model_info, resolved, meta_model, device, use_triton)
    shard, sharding = meta_model.vocab_shard, adapter_sharding(meta_model, tp_plan)
    stored = _stored_cache(config.kv_cache_dtype, device)
    assembly = Assembly(
        device, model_info, resolved, model, stored, shard, sharding, use_triton, not config.enforce_eager
    )
    with torch.inference_mode():
        if memory_utilization is None:
            return BuiltDeviceRunner(assembly.build(resolved.num_blocks).runner, kernels)
        built = build_measured(assembly, config.kv_cache_memory_bytes is None, memory_utilization)
    return BuiltDeviceRunner(built.runner, kernels, built.warnings, built.num_blocks, built.memory)


def _load(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    device: Device,
    use_triton: bool,
) -> tuple[LoadedModel, str, bool]:
    """Put the weights on the device; returns how it computes, in words, and whether with Triton."""
    if not use_triton:
        return _load_generic(config, model_info, meta_model, device), "torch", False
    from engine.kernels.triton.limits import attention_refusal
    from engine.worker import triton_stack

    refusal = attention_refusal(model_info.num_heads, model_info.num_kv_heads, model_info.head_dim)
    if refusal is not None:
        if config.kernels == "triton":
            raise ConfigError(f"--kernels triton does not run this model ({refusal}): use --kernels torch")
        refuse_quantized(config, refusal)
        return _load_generic(config, model_info, meta_model, device), f"torch ({refusal})", False
    refusal = triton_stack.refusal(meta_model.decoder)
    if refusal is None and _adds_inputs(meta_model) and meta_model.vocab_shard is not None:
        refusal = "the stack does not divide its two embeddings among ranks"
    if refusal is None:
        return _load_stack(config, model_info, resolved, meta_model, device), "triton, fused stack", True
    return _load_generic(config, model_info, meta_model, device), f"triton ({refusal})", True


def _check_formats(config: EngineConfig, model_info: ModelInfo, use_triton: bool) -> None:
    if not use_triton:
        refuse_quantized(config, "this device does not use them")
    if config.quantization == "fp8" and model_info.dtype != "bfloat16":
        raise ConfigError(f"--quantization fp8 needs --dtype bfloat16, not {model_info.dtype}")


def _check_inputs(config: EngineConfig, meta_model: MetaModel) -> None:
    """Raise ConfigError if the attention of devices can't compute the model's multimodal inputs."""
    family = MM_FAMILIES.get(meta_model.model.config.model_type)
    if family is not None and family.bidirectional:
        kinds = " and ".join(family.bidirectional)
        raise ConfigError(
            f"{config.model} isn't run on this device: the tokens of each {kinds} attend to each other, which only the "
            "CPU computes so far: use --device cpu"
        )


def _adds_inputs(meta_model: MetaModel) -> bool:
    family = MM_FAMILIES.get(meta_model.model.config.model_type)
    return family is not None and family.added


def _load_stack(
    config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, meta_model: MetaModel, device: Device
) -> LoadedModel:
    from engine.worker.stack_ranks import make_stack_ranks
    from engine.worker.triton_backend import TritonAttention
    from engine.worker.triton_stack import make_stack
    from engine.worker.triton_stack_backend import TritonStackBackend

    groups = model_info.kv_groups
    positions = resolved.max_model_len + resolved.draft_tokens
    device.bind_thread()
    with contextlib.closing(meta_model):
        meta_model.use(device.weight_memory())
        formats = _linear_formats(config, model_info, meta_model, device)
        stack = make_stack(meta_model.decoder, groups, positions, device.place, meta_model.fill, formats)
        _load_towers(meta_model, device)
    ranks = make_stack_ranks(meta_model.vocab_shard)

    def make_backend(parts: BackendParts) -> TritonStackBackend:
        attention = parts.attention
        assert isinstance(attention, TritonAttention)
        return TritonStackBackend(
            device, stack, attention, parts.logits, meta_model.decoder, ranks, adds_inputs=_adds_inputs(meta_model)
        )

    uses = [(group, window or None) for group, window in enumerate(groups.windows)]
    return LoadedModel(meta_model, uses, make_backend)


def _load_towers(meta_model: MetaModel, device: Device) -> None:
    """Put what a model has besides its decoder, which is loaded, on the device."""
    if meta_model.decoder is not meta_model.model:
        with torch.inference_mode():
            move_buffers(meta_model.model, device.place)
        meta_model.fill()


def _load_generic(config: EngineConfig, model_info: ModelInfo, meta_model: MetaModel, device: Device) -> LoadedModel:
    # What the check needs of the weights is only their shapes.
    with meta_model.zeros(cached_zeros()):
        uses = check_attention(meta_model, config, model_info)
    device.bind_thread()
    with torch.inference_mode():
        move_buffers(meta_model.model, device.place)
        with contextlib.closing(meta_model):
            meta_model.use(device.weight_memory())
            formats = _linear_formats(config, model_info, meta_model, device)
            quantize_linears(meta_model.decoder, formats, meta_model.fill)
            meta_model.fill()

    family = MM_FAMILIES.get(meta_model.model.config.model_type)

    def make_backend(parts: BackendParts) -> GenericDeviceBackend:
        if family is None:
            return GenericDeviceBackend(device, meta_model.decoder, parts.attention, parts.logits)
        return MMGenericDeviceBackend(device, meta_model.decoder, parts.attention, parts.logits, family)

    return LoadedModel(meta_model, uses, make_backend)


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
    reason = formats.refusal(meta_model.decoder)
    if reason is not None:
        raise ConfigError(f"--quantization {config.quantization}: {reason}")
    return formats


def _stored_cache(kv_cache_dtype: str | None, device: Device) -> torch.dtype | None:
    """The dtype of 8 bits that stores keys and values; None: that of the model."""
    if kv_cache_dtype == "fp8" and not device.converts_fp8:
        return torch.uint8
    return {None: None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_cache_dtype]
