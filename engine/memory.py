"""Plans the memory of an engine: weights, workspace, KV cache."""

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass

from engine.config import KV_ALLOCATION, EngineConfig, window_blocks
from engine.devices import machine_for
from engine.devices.machine import Machine, replica_flags
from engine.disaggregation import num_transfer_blocks, refusal, role_of
from engine.errors import ConfigError, OutOfMemoryError
from engine.executor_backend import RAY
from engine.host import available_memory
from engine.kv_format import HEADER_BYTES
from engine.kv_spill import FLAG as KV_SPILL
from engine.kv_spill import blocks_per_replica, parse_kv_spill
from engine.messages import MemoryLine
from engine.model.declared import divide_declared
from engine.model.model_info import ITEMSIZE, ModelInfo
from engine.model.sharding.pipeline_plan import plan_pipeline
from engine.model.sharding.tp_plan import plan_tensor_parallel
from engine.pipeline_options import check_stages_on
from engine.resolved_config import ResolvedConfig
from engine.text import human_bytes

WORKSPACE = "workspace"  # the line of what steps allocate
KV_CACHE = "KV cache"
ENCODER_FLAGS = "--max-num-batched-tokens, --mm-processor-kwargs"
MIN_UNCHUNKED_TOKENS = 512  # lower bound of a step's token budget without chunked prefill
MAX_TOKENS_IN_FLIGHT = 64  # of a request: a window keeps the blocks that tokens without a result attend to


@dataclass(frozen=True)
class Resolution:
    """The resolved configuration, and what the start table shows about it."""

    config: ResolvedConfig
    memory: tuple[MemoryLine, ...]
    warnings: tuple[str, ...]
    device: str
    sequences: int  # requests of max-model-len that fit at once
    simulated: str = ""  # the hardware that is simulated, in words; empty: the device is real
    budget_source: str = ""  # why the token budget is what it is, in words; empty: it was given


@dataclass(frozen=True, slots=True)
class _Budget:
    """The memory of one replica, in bytes."""

    available: int
    fraction: float  # of `available` that the replica may take
    weights: int
    workspace: int
    encoders: int  # embeddings of multimodal inputs, and what encoding one of them needs
    block: int  # a KV block of all layers

    @property
    def fixed(self) -> int:
        return self.weights + self.workspace + self.encoders

    @property
    def kv_cache(self) -> int:
        return max(int(self.fraction * self.available) - self.fixed, 0)


def resolve(
    config: EngineConfig, model_info: ModelInfo, available: int | None = None, machine: Machine | None = None
) -> Resolution:
    """Choose batch sizes, block size and the number of KV blocks of one replica.

    Args:
        available: bytes that the replica may use; None: its share of what is free now.
        machine: the device; None: that of `config`.

    Raises OutOfMemoryError if one request of max-model-len does not fit; the message has flags and values that work.
    """
    machine = machine or machine_for(config)
    if model_info.pooling is not None and machine.torch_type:
        raise ConfigError(f"embeddings and scores are computed on the CPU only: use --device cpu for {config.model}")
    check_stages_on(config, machine.torch_type)
    if model_info.pooling is not None and role_of(config):
        raise refusal("a model that pools generates nothing after its prompt: use --dp")
    batch = _batch_sizes(config, model_info, machine)
    max_num_seqs, budget, budget_source = batch
    block_size = config.block_size or machine.defaults.block_size
    of_ranks, ranks = _divide(config, model_info), config.tensor_parallel_size
    warnings = [*model_info.warnings, *of_ranks.warnings]
    # Ranks share the machine: from here on figures are sums over ranks.
    workspace = ranks * sum(machine.workspace(one, max_num_seqs, budget, block_size) for one in of_ranks.stages)
    model_info = of_ranks.sums(model_info, ranks)
    replicas = config.data_parallel_size
    available = machine.available_memory() if available is None else available
    fraction = config.gpu_memory_utilization or machine.defaults.memory_utilization
    encoder_cache_tokens = 0 if model_info.mm is None else max(budget, model_info.mm.most_tokens)
    # Of pipeline stages only the first one encodes.
    encoders = _encoder_lines(model_info, encoder_cache_tokens, ranks, machine.encoder_dtype(model_info.dtype))
    memory = _Budget(
        available, fraction, model_info.weight_bytes, workspace, sum(line.bytes for line in encoders),
        model_info.kv_bytes_per_token * block_size,
    )  # fmt: skip
    per_request = max_blocks(model_info.max_model_len, model_info.kv_groups.windows, budget, block_size)
    num_blocks = _num_blocks(config, memory, per_request, max_num_seqs, shared=not machine.torch_type)
    transfer_blocks = num_transfer_blocks(num_blocks, per_request) if role_of(config) else 0
    if num_blocks < per_request + 1:
        raise OutOfMemoryError(_too_little(config, model_info, num_blocks, budget, block_size, memory))
    resolved = _resolved(config, model_info, machine, batch, num_blocks, encoder_cache_tokens)
    resolved = dataclasses.replace(resolved, role=role_of(config), transfer_blocks=transfer_blocks)
    lines = (
        MemoryLine("weights", model_info.weight_bytes, "--dtype, --quantization"),
        MemoryLine(WORKSPACE, workspace, "--max-num-batched-tokens, --max-num-seqs"),
        *encoders,
        *_block_lines(num_blocks * memory.block, transfer_blocks * memory.block),
    )
    on_host = machine.torch_type == ""
    free = available * replicas if on_host else available_memory()
    planned = sum(line.bytes for line in lines) * replicas if on_host else 0
    parts = of_ranks.part_bytes(ranks, block_size)
    resolved = _with_spill(config, dataclasses.replace(resolved, kv_part_bytes=parts), free - planned)
    warnings += _too_large_inputs(model_info, budget)
    warnings += [*_too_much(lines, available, config), *machine.warnings(config)]
    sequences = min((num_blocks - 1) // per_request, max_num_seqs) if per_request else max_num_seqs
    return Resolution(
        resolved, lines, tuple(warnings), machine.describe(config), sequences, machine.simulated, budget_source
    )


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The model as its ranks run it: what a rank of each pipeline stage has, and the weights of all ranks in bytes.

    `ranks` below: those of each stage, `--tp`.
    """

    stages: tuple[ModelInfo, ...]
    weight_bytes: int
    warnings: tuple[str, ...]

    def part_bytes(self, ranks: int, block_size: int) -> tuple[int, ...]:
        """Bytes of a KV block on each rank."""
        return tuple(one.kv_bytes_per_token * block_size for one in self.stages for _ in range(ranks))

    def sums(self, model_info: ModelInfo, ranks: int) -> ModelInfo:
        """The model with the bytes of all ranks together."""
        kv_bytes = ranks * sum(one.kv_bytes_per_token for one in self.stages)
        return dataclasses.replace(model_info, weight_bytes=self.weight_bytes, kv_bytes_per_token=kv_bytes)


def _divide(config: EngineConfig, model_info: ModelInfo) -> _Ranks:
    info, weight_bytes, warnings = model_info, model_info.weight_bytes, tuple[str, ...]()
    if config.tensor_parallel_size > 1:
        tp_plan = (divide_declared if config.simulated else plan_tensor_parallel)(config, model_info)
        info, weight_bytes, warnings = tp_plan.rank_info, tp_plan.weight_bytes, tp_plan.warnings
    if config.pipeline_parallel_size == 1:
        return _Ranks((info,), weight_bytes, warnings)
    plan = plan_pipeline(config, model_info)
    stages = tuple(plan.rank_info(stage.number, info) for stage in plan.stages)
    return _Ranks(stages, int(weight_bytes * sum(plan.shares)), warnings)


def _num_blocks(config: EngineConfig, memory: _Budget, per_request: int, max_num_seqs: int, *, shared: bool) -> int:
    """The KV blocks of a replica; of an encoder, which has no KV cache, the null block only.

    `shared`: the KV cache is in the memory of the host, where the blocks of prompts in transfer are too.
    """
    if not memory.block:
        return 1
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes // config.data_parallel_size // memory.block
    most = memory.kv_cache // memory.block
    if role_of(config) and shared:
        most -= num_transfer_blocks(most, per_request)
    return min(most, max_num_seqs * per_request + 1)


def _resolved(
    config: EngineConfig,
    model_info: ModelInfo,
    machine: Machine,
    batch: tuple[int, int, str],
    num_blocks: int,
    encoder_cache_tokens: int,
) -> ResolvedConfig:
    """The configuration of one replica; `batch` has its requests and its tokens of a step first."""
    whole_prompts = model_info.pooling is not None and model_info.pooling.whole_prompts
    prefix_caching = config.enable_prefix_caching and "no-prefix-cache" not in config.ablations and not whole_prompts
    return ResolvedConfig(
        max_model_len=model_info.max_model_len,
        max_num_seqs=batch[0],
        max_num_batched_tokens=batch[1],
        block_size=config.block_size or machine.defaults.block_size,
        num_blocks=num_blocks,
        kv_windows=model_info.kv_groups.windows,
        enable_prefix_caching=prefix_caching,
        encoder_cache_tokens=encoder_cache_tokens,
        scheduling_policy=config.scheduling_policy,
        ablations=config.ablations,
        scheduler_steps=config.num_scheduler_steps or 1,
        draft_tokens=config.num_speculative_tokens if config.speculative else 0,
        tile_table=machine.tile_table,
        pools=model_info.pooling is not None,
        whole_prompts=whole_prompts,
        pipeline_stages=config.pipeline_parallel_size,
    )


def _with_spill(config: EngineConfig, resolved: ResolvedConfig, free: int) -> ResolvedConfig:
    """The configuration with the blocks of each tier of --kv-spill.

    `free`: bytes of host memory that nothing else is planned for, for all replicas.
    """
    if config.kv_spill is None:
        return resolved
    if resolved.pools:
        raise ConfigError(f"{KV_SPILL} does not work with a model that pools: leave the flag out")
    spill, replicas = parse_kv_spill(config.kv_spill), config.data_parallel_size
    block_bytes = sum(resolved.kv_part_bytes)
    if spill.host_bytes > free:
        raise ConfigError(
            f"{KV_SPILL} host= is {human_bytes(spill.host_bytes)}, but only {human_bytes(max(free, 0))} of memory are "
            "free beside what the engine needs: lower host="
        )
    host_blocks = blocks_per_replica(spill.host_bytes, replicas, block_bytes, "host=")
    disk_blocks = 0
    if spill.disk_path:
        files = config.num_ranks if config.distributed_executor_backend == RAY else 1  # of a block
        disk_blocks = blocks_per_replica(spill.disk_bytes, replicas, block_bytes + files * HEADER_BYTES, "disk=")
    return dataclasses.replace(resolved, host_blocks=host_blocks, disk_blocks=disk_blocks)


def _block_lines(cache: int, transfers: int) -> list[MemoryLine]:
    """What KV blocks need, in bytes: prompts on their way between replicas, and the KV cache, if the model has one."""
    lines = []
    if transfers:
        lines.append(MemoryLine("prompts in transfer", transfers, KV_ALLOCATION))
    if cache:
        lines.append(MemoryLine(KV_CACHE, cache, f"{KV_ALLOCATION}, --gpu-memory-utilization"))
    return lines


def _encoder_lines(model_info: ModelInfo, cached_tokens: int, ranks: int, dtype: str) -> list[MemoryLine]:
    """What multimodal inputs need: towers and embeddings are on each of `ranks`; `dtype` is that of the towers."""
    mm = model_info.mm
    if mm is None:
        return []
    wider = ITEMSIZE[dtype] - ITEMSIZE[model_info.dtype]
    workspace = mm.encoder_workspace * ITEMSIZE[dtype] // ITEMSIZE[model_info.dtype]
    lines = [
        MemoryLine("encoder cache", ranks * cached_tokens * mm.embedding_bytes, ENCODER_FLAGS),
        MemoryLine("encoder workspace", ranks * workspace, "--mm-processor-kwargs"),
    ]
    if wider:
        lines.append(MemoryLine(f"encoder in {dtype}", ranks * mm.encoder_parameters * wider, "--dtype"))
    return lines


def _too_large_inputs(model_info: ModelInfo, budget: int) -> list[str]:
    """The warning that steps are too small for inputs that can't be split."""
    mm = model_info.mm
    if mm is None or mm.unsplit_tokens <= budget:
        return []
    return [
        f"inputs of more than {budget} tokens are refused: their tokens attend to each other, so one step computes all "
        f"of them; --max-num-batched-tokens {mm.unsplit_tokens} is enough for the largest"
    ]


def max_blocks(tokens: int, windows: tuple[int, ...], budget: int, block_size: int) -> int:
    """The most blocks that a request of `tokens` tokens holds, over all KV groups."""
    unlimited = -(-tokens // block_size)
    reach = max(budget, MAX_TOKENS_IN_FLIGHT)
    return sum(min(unlimited, window_blocks(one, reach, block_size)) if one else unlimited for one in windows)


def block_limits(resolved: ResolvedConfig) -> tuple[int, int]:
    """The least KV blocks with which one request of max-model-len fits, and the most that all requests could use."""
    per_request = max_blocks(
        resolved.max_model_len, resolved.kv_windows, resolved.max_num_batched_tokens, resolved.block_size
    )
    return per_request + 1, resolved.max_num_seqs * per_request + 1


def with_measured(
    resolution: Resolution, num_blocks: int | None, measured: tuple[MemoryLine, ...], ranks: int = 1
) -> Resolution:
    """What the workers found when they measured: the number of KV blocks, and lines in place of the workspace's.

    Host blocks get a line too: they are not the device's.

    Args:
        measured: of one of the ranks; the start table shows the sum over all.
    """
    resolved, lines, sequences = resolution.config, resolution.memory, resolution.sequences
    if measured:
        lines = tuple(line for line in lines if line.what != WORKSPACE)
        of_all = (MemoryLine(line.what, ranks * line.bytes, line.flag) for line in measured)
        lines = (*lines[:-1], *of_all, lines[-1])
    if num_blocks is not None and num_blocks != resolved.num_blocks:
        cache = lines[-1]
        block = cache.bytes // resolved.num_blocks
        lines = (*lines[:-1], MemoryLine(cache.what, num_blocks * block, cache.flag))
        resolved = dataclasses.replace(resolved, num_blocks=num_blocks)
        per_request = block_limits(resolved)[0] - 1
        sequences = min((num_blocks - 1) // per_request, resolved.max_num_seqs)
    if resolved.host_blocks:
        host_bytes = resolved.host_blocks * sum(resolved.kv_part_bytes)
        lines = (*lines, MemoryLine("evicted KV blocks, in host memory", host_bytes, KV_SPILL))
    return dataclasses.replace(resolution, config=resolved, memory=lines, sequences=sequences)


def _batch_sizes(config: EngineConfig, model_info: ModelInfo, machine: Machine) -> tuple[int, int, str]:
    """max_num_seqs, max_num_batched_tokens, and where the latter comes from, in words; empty: it was given.

    If only one is given, the other adapts: each request needs one token.
    """
    defaults = machine.defaults
    max_num_seqs, budget = config.max_num_seqs, config.max_num_batched_tokens
    if max_num_seqs is None:
        max_num_seqs = min(defaults.max_num_seqs, budget or defaults.max_num_seqs)
    pooled_whole = model_info.pooling is not None and model_info.pooling.whole_prompts
    if pooled_whole or "no-chunking" in config.ablations:
        if budget is not None and budget < model_info.max_model_len:
            why = "a vector depends on all tokens of its prompt, and " if pooled_whole else ""
            raise ConfigError(
                f"{why}without chunking a step must hold a whole prompt: --max-num-batched-tokens ({budget}) must not "
                f"be below --max-model-len ({model_info.max_model_len})"
            )
        whole = max(MIN_UNCHUNKED_TOKENS, max_num_seqs, model_info.max_model_len)
        return max_num_seqs, budget or whole, "" if budget else "a whole prompt"
    unsplit = 0 if model_info.mm is None else model_info.mm.unsplit_tokens  # beside one token of each request
    if budget is not None:
        return max_num_seqs, budget, ""
    chunk, found = max(defaults.min_chunk, unsplit), machine.step_tokens(config, model_info)
    if max_num_seqs + chunk > found.count:
        return max_num_seqs, max_num_seqs + chunk, f"one for each request, and {chunk} of prompts"
    return max_num_seqs, found.count, found.source


def _too_much(lines: tuple[MemoryLine, ...], available: int, config: EngineConfig) -> list[str]:
    """The warning that more memory is planned than is free, which --kv-cache-memory-bytes allows."""
    total, replicas = sum(line.bytes for line in lines), config.data_parallel_size
    if total <= available:
        return []
    planned, free = human_bytes(total * replicas), human_bytes(available * replicas)
    flags = " or ".join([KV_ALLOCATION, *replica_flags(config)])
    return [f"{planned} of memory are planned, but only {free} are free: lower {flags}"]


def _too_little(
    config: EngineConfig, model_info: ModelInfo, num_blocks: int, budget: int, block_size: int, memory: _Budget
) -> str:
    """The error that one request does not fit, with flags and values that work."""

    def blocks_for(tokens: int) -> int:
        return max_blocks(tokens, model_info.kv_groups.windows, budget, block_size)

    needed = (blocks_for(model_info.max_model_len) + 1) * memory.block
    fits = bisect_right(range(1, model_info.max_model_len), num_blocks - 1, key=blocks_for) // block_size * block_size
    replicas = config.data_parallel_size
    each = f" for each of {replicas} replicas" if replicas > 1 else ""
    fixed = memory.fixed
    encoders = f", {human_bytes(memory.encoders)} for images and audio" if memory.encoders else ""
    if config.kv_cache_memory_bytes is not None:
        given = f"{KV_ALLOCATION} {config.kv_cache_memory_bytes} holds{each}"
        ways = [f"{KV_ALLOCATION} {needed * replicas}"]
    else:
        given = (
            f"{memory.fraction:.0%} of {human_bytes(memory.available)} free memory{each} less "
            f"{human_bytes(memory.weights)} of weights{encoders} and {human_bytes(memory.workspace)} of workspace "
            "leaves room for"
        )
        enough = (fixed + needed) / max(memory.available, 1)
        ways = [f"--gpu-memory-utilization {min(1.0, enough + 0.01):.2f}"] if enough <= 1 else []
    if fits > 0:
        ways.append(f"--max-model-len {fits}")
    if not ways:
        ways.append(f"a machine with {human_bytes(replicas * (fixed + needed))} free, or a smaller model")
    ways += [f"a lower {flag}" for flag in replica_flags(config)]
    return (
        f"one request of {model_info.max_model_len} tokens needs {human_bytes(needed)} of KV cache, but {given} "
        f"{max(fits, 0)} tokens: use {' or '.join(ways)}"
    )
