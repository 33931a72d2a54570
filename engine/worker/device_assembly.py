"""Assembles the runner of an asynchronous device around a model whose weights are there, for a number of KV blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from engine.model.loading.meta_model import MetaModel
from engine.model.loading.open_model import kv_layout
from engine.model.model_info import ITEMSIZE, ModelInfo
from engine.model.rotary_axes import uses_mrope
from engine.model.runtime.attention_interface import KVCache
from engine.model.runtime.vocab_shard import VocabShard
from engine.resolved_config import ResolvedConfig
from engine.worker.adapter_manager import AdapterSharding
from engine.worker.device import Device
from engine.worker.device_attention import Attention, GroupWindow, TorchAttention
from engine.worker.device_backend import DeviceBackend
from engine.worker.device_kv_blocks import DeviceBlocks
from engine.worker.device_logits import DeviceLogits
from engine.worker.device_runner import DeviceRunner
from engine.worker.device_slots import DeviceSlots
from engine.worker.device_steps import EagerSteps, Pad
from engine.worker.graphs import StepGraphs
from engine.worker.kv_blocks import cache_parts
from engine.worker.mm_device_slots import MMDeviceSlots
from engine.worker.mm_start import encoder_cache, input_tokens
from engine.worker.rank_causes import agreement
from engine.worker.step_inputs import DeviceState, InputStager, StepKernels
from engine.worker.step_sizes import StepSizes

if TYPE_CHECKING:
    from engine.worker.triton_backend import TritonAttention


@dataclass(frozen=True, slots=True)
class BackendParts:
    """What a model backend uses beside the model."""

    attention: Attention
    logits: DeviceLogits


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose weights are on the device.

    meta_model: the modules, those of towers included. uses: the groups and windows of the decoder's layers, see
    `check_attention`.
    """

    meta_model: MetaModel
    uses: Sequence[GroupWindow]
    make_backend: Callable[[BackendParts], DeviceBackend]


@dataclass(frozen=True, slots=True)
class Assembled:
    """A runner, and how its steps are enqueued. pad: None where the attention's arrays have no fixed sizes."""

    runner: DeviceRunner
    eager: EagerSteps
    sizes: StepSizes
    pad: Pad | None
    graphs: StepGraphs | None

    def run_largest(self) -> None:
        """Enqueue a step of the largest size that is all padding."""
        assert self.pad is not None
        inputs = self.eager.put_padding(self.sizes.in_capture_order[0], self.pad)
        self.eager.enqueue_forward(inputs)
        self.eager.enqueue_choice(inputs)


@dataclass(frozen=True, slots=True)
class Assembly:
    """What a runner is made of, once the weights are on the device.

    Args:
        model_info: of the rank.
        stored: dtype of the KV cache; None: that of the model.
        shard, sharding: of the vocabulary and of adapters; None with one rank.
        use_triton: whether attention, sampling and the state of slots use the kernels in Triton.
        capture: whether steps are captured, if the device does that.
    """

    device: Device
    model_info: ModelInfo
    resolved: ResolvedConfig
    model: LoadedModel
    stored: torch.dtype | None
    shard: VocabShard | None
    sharding: AdapterSharding | None
    use_triton: bool
    capture: bool

    def without_graphs(self) -> "Assembly":
        return replace(self, capture=False)

    def agree(self, number: int) -> int:
        """The smallest of the numbers with which the ranks call it; all must do so in the same order."""
        return number if self.shard is None else self.shard.group.smallest(number)

    def build(self, num_blocks: int) -> Assembled:
        """Allocate KV cache and slots, and make a runner."""
        device, resolved, pad = self.device, self.resolved, None
        rows, slots = resolved.max_num_seqs, self._make_slots()
        state = DeviceState(device, slots.layout)
        layout = kv_layout(self.model_info, resolved.block_size)
        cache = KVCache(self.model_info.kv_groups, num_blocks, layout, device.zeros, self.stored)
        attention: Attention
        if self.use_triton:
            kernels, attention = self._triton_parts(cache, state)
            pad = attention.padded
        else:
            kernels = StepKernels() if self.shard is None else StepKernels().sharded(self.shard.gather)
            attention = TorchAttention(cache, self.model.uses, cache.keys[0].device)
        logits = DeviceLogits(device, kernels, state.parameters, self.shard, rows)
        backend = self.model.make_backend(BackendParts(attention, logits))
        stager = InputStager(device, slots, state, kernels)
        mrope = uses_mrope(self.model.meta_model.decoder)
        eager = EagerSteps(device, backend, state, stager, kernels, repeats=self.shard is None, mrope=mrope)
        sizes = StepSizes(rows, resolved.max_num_batched_tokens)
        graphs = None
        if pad is not None and self.capture and device.captures:
            graphs = StepGraphs(device, eager, sizes, pad, self.agree)
        blocks = DeviceBlocks(device, cache_parts(cache), 0 if self.shard is None else self.shard.group.rank)
        runner = DeviceRunner(device, backend, slots, graphs or eager, self.sharding, blocks)
        return Assembled(runner, eager, sizes, pad, graphs)

    def _make_slots(self) -> DeviceSlots:
        resolved, mm, whole = self.resolved, self.model_info.mm, self.model.meta_model.model
        groups = len(resolved.kv_windows)
        shape = resolved.max_num_seqs, resolved.max_model_len, resolved.block_size, resolved.draft_tokens, groups
        if mm is None:
            return DeviceSlots(*shape)
        cache, group = encoder_cache(whole, self.device.place), None if self.shard is None else self.shard.group
        return MMDeviceSlots(cache, input_tokens(whole, mm), *shape, agree=agreement(group))

    def _triton_parts(self, cache: KVCache, state: DeviceState) -> tuple[StepKernels, "TritonAttention"]:
        from engine.kernels.triton.attention import AttentionShape
        from engine.worker.triton_backend import (
            TritonAttention,
            default_tilings,
            sharded_step_kernels,
            triton_step_kernels,
        )

        layout, resolved, model_info = cache.layout, self.resolved, self.model_info
        shape = AttentionShape(model_info.num_heads, layout.kv_heads, layout.head_dim, layout.block_size)
        quantized = cache.keys[0].dtype.itemsize == 1
        itemsize, table = ITEMSIZE[model_info.dtype], resolved.tile_table
        tilings = default_tilings(shape, itemsize, quantized=quantized, tile_table=table)
        sampled = resolved.max_num_seqs * (1 + resolved.draft_tokens)
        # Every running request computes a token, and draft tokens besides.
        tokens = max(resolved.max_num_batched_tokens, sampled)
        if self.shard is None:
            kernels = triton_step_kernels(sampled, model_info.vocab_size, state.words.device)
        else:
            kernels = sharded_step_kernels(sampled, self.shard, state.words.device)
        return kernels, TritonAttention(cache, self.model.uses, state.tables, shape, tilings, tokens)
