"""Chooses the model backend of a rank, and builds it with its weights and KV cache."""

from ctypes import c_uint8
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.config import EngineConfig
from engine.devices.cpu import pytorch_warnings
from engine.errors import ConfigError
from engine.host import threads_per_rank
from engine.kernels.cpu import bindings, build, packed_files
from engine.kernels.cpu.bindings import Stack
from engine.kernels.cpu.build import BuildError
from engine.model.composed_decoder import outer_modules
from engine.model.loading.meta_model import MetaModel
from engine.model.loading.open_model import Progress, fill_and_check, kv_layout, open_model
from engine.model.loading.outline import open_outline
from engine.model.model_info import ModelInfo
from engine.model.runtime.attention_interface import KVCache
from engine.multimodal.families import MM_FAMILIES
from engine.resolved_config import ResolvedConfig
from engine.worker import fused_stack
from engine.worker.fused_backend import FusedBackend
from engine.worker.fused_stack import StackFormats
from engine.worker.generic_backend import GenericBackend
from engine.worker.kv_blocks import CPUBlocks, KVBlocks, cache_parts
from engine.worker.mm_generic_backend import MMGenericBackend
from engine.worker.model_backend import ModelBackend
from engine.worker.page_supply import PageSupply
from engine.worker.threads import cores_of_rank

if TYPE_CHECKING:
    from engine.worker.stage_links import StageLinks


@dataclass(frozen=True, slots=True)
class BuiltBackend:
    """A model backend and what the start table reports about it."""

    backend: ModelBackend
    blocks: KVBlocks
    kernels: str
    warnings: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()  # of the rank's threads; the calling thread belongs on the first. Empty: any core


def open_for_backend(
    config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, progress: Progress | None = None
) -> MetaModel:
    """Open the model of a single rank: as an outline if the fused stack will run it, else as transformers' class.

    Arguments as of `build_backend` and `open_model`, whose errors it raises.
    """
    isas, _ = _isas_to_try(config)
    outline = open_outline(config, model_info, progress) if isas else None
    if outline is not None:
        formats = _formats(config, model_info)
        refused = _refusal(outline, formats, resolved.block_size)
        if refused is None and _first_compiled(config, isas, formats)[0] is not None:
            return outline
        outline.close()
    return open_model(config, model_info, progress)


def build_backend(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    links: "StageLinks | None" = None,
) -> BuiltBackend:
    """Build the fused stack if --kernels, the machine and the model allow it, else the generic backend.

    Args:
        model_info: of the rank.
        meta_model: the rank's shard of the model, before it is filled.
        links: to the other pipeline stages; None: there are none.

    Raises ConfigError for kernels that this machine can't run, and for options that only the C++ kernels have.
    """
    isas, reason = _isas_to_try(config)
    unsupported = False
    formats = _formats(config, model_info)
    if isas:
        refusal = _refusal(meta_model, formats, resolved.block_size)
        unsupported = refusal is not None
        isa, reason = (None, refusal) if unsupported else _first_compiled(config, isas, formats)
        if isa is not None:
            return _build_fused(config, model_info, resolved, meta_model, formats, isa, links)
    for flag, value in (("--quantization", config.quantization), ("--kv-cache-dtype", config.kv_cache_dtype)):
        if value is not None:
            raise ConfigError(f"{flag} {value} needs the C++ CPU kernels: {reason}")
    if config.deterministic:
        raise ConfigError(
            f"--deterministic needs the C++ CPU kernels: {reason}. With PyTorch the size of the batch decides in which "
            "order numbers are added up"
        )
    cache = KVCache(model_info.kv_groups, resolved.num_blocks, kv_layout(model_info, resolved.block_size))
    backend = _build_generic(config, model_info, meta_model, cache, links)
    warnings = pytorch_warnings(model_info.dtype)
    if config.kernels == "auto" and not unsupported:
        warnings.insert(0, f"{reason}: falling back to PyTorch, which is several times slower")
    blocks = CPUBlocks([part.numpy() for part in cache_parts(cache)], _rank(config, meta_model, links))
    return BuiltBackend(backend, blocks, f"torch ({reason})", tuple(warnings))


def _rank(config: EngineConfig, meta_model: MetaModel, links: "StageLinks | None") -> int:
    """The number of the rank in its replica."""
    rank = 0 if meta_model.vocab_shard is None else meta_model.vocab_shard.group.rank
    return rank if links is None else links.stage.number * config.tensor_parallel_size + rank


def _build_generic(
    config: EngineConfig,
    model_info: ModelInfo,
    meta_model: MetaModel,
    cache: KVCache,
    links: "StageLinks | None",
) -> ModelBackend:
    family = MM_FAMILIES.get(meta_model.model.config.model_type)
    if links is not None:
        from engine.model.sharding.stage_model import connect_stage
        from engine.worker.stage_backends import GenericStageBackend, MMGenericStageBackend

        states, width = connect_stage(meta_model, links.stage), model_info.hidden_size
        stage_decoder = fill_and_check(meta_model, config, model_info)
        of_family = () if family is None else (family,)
        make = GenericStageBackend if family is None else MMGenericStageBackend
        shard = meta_model.vocab_shard
        return make(stage_decoder, cache, shard, *of_family, states=states, links=links, width=width)
    decoder = fill_and_check(meta_model, config, model_info)
    if family is None:
        return GenericBackend(decoder, cache, meta_model.vocab_shard)
    return MMGenericBackend(decoder, cache, meta_model.vocab_shard, family)


def _formats(config: EngineConfig, model_info: ModelInfo) -> StackFormats:
    dtype = model_info.dtype
    return StackFormats(dtype, config.quantization or dtype, config.kv_cache_dtype or dtype)


def _refusal(meta_model: MetaModel, formats: StackFormats, block_size: int) -> str | None:
    """Why the rank's shard of the model can't use the fused stack; None if it can."""
    family = MM_FAMILIES.get(meta_model.model.config.model_type)
    if family is not None and family.bidirectional:
        return "the kernels do not support tokens of an image that attend to each other"
    if family is not None and family.added and meta_model.vocab_shard is not None:
        return "the kernels do not divide its two embeddings among ranks"
    return fused_stack.refusal(meta_model.decoder, formats, block_size)


def _build_fused(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    formats: StackFormats,
    isa: str,
    links: "StageLinks | None",
) -> BuiltBackend:
    part = meta_model.vocab_shard
    spec, owners = fused_stack.make_spec(
        meta_model.decoder,
        formats,
        resolved.num_blocks,
        resolved.block_size,
        model_info.kv_groups,
        partial=part is not None,
        first_token=0 if part is None else part.first,
        fill=meta_model.fill,
        packed_folder=packed_files.default_folder(),
        stage=model_info.stage,
    )
    if links is None or links.stage.is_first:
        meta_model.fill_each(outer_modules(meta_model.model))
    threads, rank = threads_per_rank(config.total_ranks), _rank(config, meta_model, links)
    cores = cores_of_rank(threads, config.first_rank + rank, config.total_ranks)
    stack = Stack(spec, formats.weights, formats.cache, threads, isa, owners, cores)
    keys, values = spec.layer[0].keys, spec.layer[0].values
    region_bytes = values - keys
    regions = 2 * model_info.kv_groups.group_size
    pages = PageSupply(owners, keys, regions, region_bytes, region_bytes // resolved.num_blocks)
    family = MM_FAMILIES.get(meta_model.model.config.model_type)
    adds = family is not None and family.added
    backend: ModelBackend
    if links is None:
        backend = FusedBackend(stack, spec, meta_model.decoder, part, pages, adds_inputs=adds)
    else:
        from engine.worker.stage_backends import FusedStageBackend

        backend = FusedStageBackend(stack, spec, meta_model.decoder, part, pages, links=links, adds_inputs=adds)
    memory = (c_uint8 * (regions * region_bytes)).from_address(keys)
    blocks = CPUBlocks(np.frombuffer(memory, np.uint8).reshape(regions, resolved.num_blocks, -1), rank)
    return BuiltBackend(backend, blocks, f"{isa}, fused stack", cores=cores)


def _isas_to_try(config: EngineConfig) -> tuple[list[str], str | None]:
    """The instruction sets to try in turn, or the reason why there are none."""
    if config.kernels == "torch":
        return [], "--kernels torch"
    if config.kernels == "auto":
        isas = build.supported_isas()
        return isas, None if isas else "the CPU kernels need AVX2 or NEON"
    missing = build.missing_features(config.kernels)
    if missing:
        raise ConfigError(f"--kernels {config.kernels}: this machine lacks {', '.join(missing)}; auto chooses the best")
    return [config.kernels], None


def _first_compiled(config: EngineConfig, isas: list[str], formats: StackFormats) -> tuple[str | None, str | None]:
    """The first instruction set that the compiler can compile (an old one lacks the newest), or the first cause."""
    causes = []
    for isa in isas:
        try:
            bindings.load(isa, formats.weights, formats.cache)
        except BuildError as error:
            if config.kernels != "auto":
                raise ConfigError(f"--kernels {isa}: {error}") from error
            causes.append(str(error))
        else:
            return isa, None
    return None, causes[0]
