"""Runs steps on one rank: batch, forward pass, sampling."""

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from engine.arrays import Float32s, Float64s, Int64s
from engine.columns import column, int32s
from engine.config import EngineConfig
from engine.devices.cpu import encoder_dtype
from engine.grammar import TokenMasks
from engine.heap import large_allocations_mapped
from engine.logprob_columns import TokenLogprobs
from engine.messages import StepMessage, StepResult, encode
from engine.model.loading.meta_model import MetaModel
from engine.model.model_info import ModelInfo
from engine.model.sharding.tp_plan import TPPlan
from engine.resolved_config import ResolvedConfig
from engine.worker import prompt_logprobs, sampler
from engine.worker.adapter_manager import AdapterManager, AdapterRanks, AdapterSharding, adapter_sharding
from engine.worker.backend_builder import BuiltBackend, build_backend
from engine.worker.kv_blocks import KVBlocks
from engine.worker.mm_slots import MMSlots
from engine.worker.mm_start import encoder_cache, input_tokens
from engine.worker.model_backend import ModelBackend
from engine.worker.rank_barrier import barrier_calls
from engine.worker.rank_causes import Agree, agreement
from engine.worker.rank_protocol import Features
from engine.worker.slots import StepBatch, WorkerSlots
from engine.worker.step_runner import StepRunner

if TYPE_CHECKING:
    from engine.worker.stage_links import StageLinks


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How the tokens at a step's `sampled_at` are chosen: by the model backend, or by the sampler from logits.

    temperatures, uniforms: [sampled_at], see `ModelBackend.choose`; None if all slots are sampled from logits.
    from_logits: int64[n], the slots that are sampled from logits, as indices into `sampling`.
    logits_of: int64[n], the entries of `sampled_at` that belong to them.
    by_backend, chosen_at: the same of the other slots; of an entry with draft tokens before it, the last one.
    """

    temperatures: Float32s | None
    uniforms: Float64s | None
    from_logits: Int64s
    logits_of: Int64s
    by_backend: Int64s
    chosen_at: Int64s


class Runner(StepRunner[SamplingPlan]):
    """The state of one rank: the requests that run, the model backend, and a step that waits to be sampled."""

    def __init__(
        self,
        backend: ModelBackend,
        slots: WorkerSlots,
        ranks: AdapterRanks | None = None,
        blocks: KVBlocks | None = None,
    ):
        adapters = AdapterManager(backend, slots.adapter_slots, ranks)
        super().__init__({**adapters.calls, **barrier_calls(ranks)}, blocks)
        self._backend = backend
        self._slots = slots
        self._seconds = 0.0

    def _advance(self, message: StepMessage) -> tuple[StepBatch, SamplingPlan]:
        began = time.perf_counter()
        batch = self._slots.begin_step(message)
        plan = self._plan_sampling(batch)
        if len(batch.slots):
            self._compute(batch, plan)
        self._seconds = time.perf_counter() - began
        return batch, plan

    def _compute(self, batch: StepBatch, _plan: SamplingPlan) -> None:
        self._backend.forward(batch)

    @torch.inference_mode()
    def sample(self, step: int, masks: bytes = b"") -> bytes:
        """Sample a step, append its tokens to its slots, and encode the StepResult. Later steps of a burst run here.

        `masks`: see `engine.core.protocols.Executor.sample`.
        """
        batch, plan = self._take(step)
        began = time.perf_counter()
        tokens, logprobs, counts, drafted = np.zeros(0, dtype=np.int64), None, b"", int(batch.num_draft_tokens.sum())
        if len(batch.sampling):
            tokens, logprobs = self._choose(batch, plan, TokenMasks(masks) if masks else None)
            if drafted:
                tokens, each = self._append_accepted(batch, tokens)
                counts, logprobs = column(each), reindexed(logprobs, np.cumsum(each) - each)
            else:
                self._append(batch, tokens)
        scored = prompt_logprobs.score(self._backend, batch, self._slots) if len(batch.scored_at) else ()
        seconds = self._seconds + time.perf_counter() - began
        reports = self._slots.take_reports()
        return encode(StepResult(step, column(tokens), counts, logprobs, seconds, drafted, reports, scored))

    def put_features(self, features: Features) -> None:
        self._slots.put_features(features)

    def _append(self, batch: StepBatch, tokens: Int64s) -> None:
        """Append one token to each slot that samples."""
        self._slots.append_tokens(batch.sampling, tokens)

    def _append_accepted(self, batch: StepBatch, tokens: Int64s) -> tuple[Int64s, Int64s]:
        """Append the tokens of a step with draft tokens; see `WorkerSlots.append_accepted`."""
        return self._slots.append_accepted(batch, tokens)

    def _plan_sampling(self, batch: StepBatch) -> SamplingPlan:
        """Plan how tokens are chosen: for each slot by its own parameters only, so that batching does not matter."""
        slots, which = self._slots, batch.sampling
        from_logits = self._are_from_logits(which)
        last = np.cumsum(batch.num_draft_tokens + 1) - 1  # only greedy slots have draft tokens
        temperatures = uniforms = None
        if not from_logits.all():
            temperatures = np.zeros(len(batch.sampled_at), dtype=np.float32)
            temperatures[last] = np.where(from_logits, 0, slots.temperature[which])
            uniforms = np.zeros(len(batch.sampled_at))
            uniforms[last] = sampler.uniform(
                slots.seed[which], slots.num_tokens[which] - slots.num_prompt_tokens[which]
            )
        return SamplingPlan(
            temperatures, uniforms, np.flatnonzero(from_logits), last[from_logits],
            np.flatnonzero(~from_logits), last[~from_logits],
        )  # fmt: skip

    def _are_from_logits(self, slots: Int64s) -> NDArray[np.bool_]:
        """Which of the slots are sampled from logits."""
        return self._slots.needs_logits[slots]

    def _choose(
        self, batch: StepBatch, plan: SamplingPlan, masks: TokenMasks | None
    ) -> tuple[Int64s, TokenLogprobs | None]:
        """The tokens at `sampled_at`, and the logprobs, which are indexed by entries of `sampling`."""
        tokens: Int64s = np.zeros(len(batch.sampled_at), dtype=np.int64)
        if plan.temperatures is not None and plan.uniforms is not None:
            masked = None if masks is None else masks.of(batch.sampling[plan.by_backend], plan.chosen_at)
            tokens = self._backend.choose(plan.temperatures, plan.uniforms, masked)
        if not len(plan.logits_of):
            return tokens, None
        which = batch.sampling[plan.from_logits]
        sampled = sampler.sample(self._backend.logits(plan.logits_of), self._slots, which, masks)
        tokens[plan.logits_of] = sampled.tokens
        return tokens, reindexed(sampled.logprobs, plan.from_logits)


def build_runner(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    tp_plan: TPPlan | None = None,
) -> tuple[Runner, BuiltBackend]:
    """Build a rank's runner; `model_info` is the rank's, `tp_plan` is how ranks divide the model."""
    built, sharding = build_parts(config, model_info, resolved, meta_model, tp_plan)
    shard = meta_model.vocab_shard
    slots = build_slots(resolved, model_info, meta_model, agreement(None if shard is None else shard.group))
    return Runner(built.backend, slots, sharding, built.blocks), built


def build_parts(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    tp_plan: TPPlan | None,
    links: "StageLinks | None" = None,
) -> tuple[BuiltBackend, AdapterSharding | None]:
    """Build a rank's model backend, and with several ranks the sharding of adapters.

    `links`: to the other pipeline stages; None: there are none.
    """
    with large_allocations_mapped(), contextlib.closing(meta_model):
        built = build_backend(config, model_info, resolved, meta_model, links)
    return built, adapter_sharding(meta_model, tp_plan)


def build_slots(
    resolved: ResolvedConfig, model_info: ModelInfo, meta_model: MetaModel, agree: Agree | None = None
) -> WorkerSlots:
    """The slots of a rank; with an encoder, if the model takes multimodal inputs. `agree`: see `MMSlots`."""
    shape = slots_shape(resolved)
    if model_info.mm is None:
        return WorkerSlots(*shape)
    model, dtype = meta_model.model, getattr(torch, encoder_dtype(model_info.dtype))
    cache = encoder_cache(model, dtype=dtype)
    return MMSlots(cache, input_tokens(model, model_info.mm), *shape, agree=agree)


def slots_shape(resolved: ResolvedConfig) -> tuple[int, int, int, int, int]:
    """The arguments of `WorkerSlots`."""
    groups = len(resolved.kv_windows)
    return resolved.max_num_seqs, resolved.max_model_len, resolved.block_size, resolved.draft_tokens, groups


def reindexed(logprobs: TokenLogprobs | None, to: Int64s) -> TokenLogprobs | None:
    """The same logprobs with each index i replaced by to[i]."""
    return logprobs and msgspec.structs.replace(logprobs, index=column(to[int32s(logprobs.index)]))
