"""Runs the steps of a model that pools: a step yields vectors in place of tokens."""

import contextlib
import time
from dataclasses import dataclass

import numpy as np

from engine.arrays import Float32s, Int64s
from engine.config import EngineConfig
from engine.devices.cpu import pytorch_warnings
from engine.heap import large_allocations_mapped
from engine.messages import SlotAssignment, StepMessage, StepResult, encode
from engine.model.loading.meta_model import MetaModel
from engine.model.loading.open_model import read_head
from engine.model.model_info import ModelInfo
from engine.resolved_config import ResolvedConfig
from engine.worker.backend_builder import BuiltBackend, build_backend
from engine.worker.fused_backend import FusedBackend
from engine.worker.generic_backend import GenericBackend
from engine.worker.pooling_backend import DecoderPooling, EncoderPooling, PoolingBackend
from engine.worker.slots import StepBatch, WorkerSlots
from engine.worker.step_runner import StepRunner


@dataclass(frozen=True, slots=True)
class BuiltPooling:
    """What the start table reports about a model that pools; see `BuiltBackend`."""

    kernels: str
    warnings: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


class PoolingSlots(WorkerSlots):
    """The slots of a model that pools."""

    def __init__(self, max_slots: int, max_model_len: int, block_size: int, num_groups: int):
        super().__init__(max_slots, max_model_len, block_size, num_groups=num_groups)
        self.second_segment: Int64s = np.zeros(max_slots, dtype=np.int64)

    def _assign(self, assignment: SlotAssignment) -> None:
        super()._assign(assignment)
        self.second_segment[assignment.slot] = assignment.second_segment


class PoolingRunner(StepRunner[Float32s]):
    """The state of the one rank of a model that pools."""

    def __init__(self, backend: PoolingBackend, slots: PoolingSlots):
        super().__init__({})
        self._backend = backend
        self._slots = slots
        self._seconds = 0.0

    def _advance(self, message: StepMessage) -> tuple[StepBatch, Float32s]:
        began = time.perf_counter()
        batch = self._slots.begin_step(message)
        vectors: Float32s = np.empty((0, 0), np.float32)
        if len(batch.slots):
            vectors = self._backend.pool(batch, self._slots.second_segment[batch.slots]).numpy()
        self._seconds = time.perf_counter() - began
        return batch, vectors

    def sample(self, step: int, masks: bytes = b"") -> bytes:
        """Encode the StepResult of a step."""
        assert not masks, "a model that pools samples no tokens"
        _, vectors = self._take(step)
        return encode(StepResult(step, b"", seconds=self._seconds, vectors=vectors.tobytes()))


def build_pooling_runner(
    config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, meta_model: MetaModel
) -> tuple[PoolingRunner, BuiltPooling]:
    """Load a model that pools, and allocate the KV cache of a decoder."""
    spec, slots = model_info.pooling, pooling_slots(resolved)
    assert spec is not None, "the model generates"
    with large_allocations_mapped(), contextlib.closing(meta_model):
        if spec.encoder:
            meta_model.fill()
            warnings = tuple(pytorch_warnings(model_info.dtype))
            encoder = EncoderPooling(meta_model.model, spec)
            return PoolingRunner(encoder, slots), BuiltPooling("torch (transformers' class)", warnings)
        built = build_backend(config, model_info, resolved, meta_model)
    pooling = decoder_pooling(config, model_info, built)
    return PoolingRunner(pooling, slots), BuiltPooling(built.kernels, built.warnings, built.cores)


def pooling_slots(resolved: ResolvedConfig) -> PoolingSlots:
    """The slots of a rank."""
    groups = len(resolved.kv_windows)
    return PoolingSlots(resolved.max_num_seqs, resolved.max_model_len, resolved.block_size, groups)


def decoder_pooling(config: EngineConfig, model_info: ModelInfo, built: BuiltBackend) -> DecoderPooling:
    """What pools the hidden states of a decoder, which this rank has, or the last layers of it."""
    spec = model_info.pooling
    assert spec is not None, "the model generates"
    assert isinstance(built.backend, FusedBackend | GenericBackend), "multimodal models don't pool"
    head = read_head(config, model_info) if spec.task == "classify" else None
    return DecoderPooling(built.backend, spec, head)
