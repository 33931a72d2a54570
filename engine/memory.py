"""What the device offers, and how the engine divides it: weights, workspace, KV cache."""

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from engine.config import KV_ALLOCATION, EngineConfig, ResolvedConfig, window_blocks
from engine.errors import ConfigError, OutOfMemoryError
from engine.machine import available_memory, cores
from engine.messages import MemoryLine
from engine.model.facts import ITEMSIZE, ModelFacts
from engine.model.split import plan_split

ROWS = 128
# A prompt is computed as fast in chunks of 128 tokens as in larger ones (2 cores: 3.7 k tokens/s against 3.2 k at 512),
# and streams wait a quarter as long for it; however many rows decode, a chunk gets at least CHUNK.
BUDGET = 128
CHUNK = 64
WHOLE_PROMPTS = 512  # at least, of a step without chunking
BLOCK_SIZE = 32
UTILIZATION = 0.5  # of available memory: the CPU's memory is everyone's
MODEL_ROWS_IN_FLOAT = 32  # the sampler's slice
QUERY_TILE = 64  # the attention's
IN_FLIGHT = 64  # tokens of a row, at most, whose results are to come: a window keeps what they see


@dataclass(frozen=True)
class Resolution:
    """Every choice made, and what the start table says about it."""

    config: ResolvedConfig
    memory: tuple[MemoryLine, ...]
    warnings: tuple[str, ...]
    device: str
    sequences: int  # requests of max-model-len that fit at once


def resolve(config: EngineConfig, facts: ModelFacts, available: int | None = None) -> Resolution:
    """Choose rows, budget, block and the number of KV blocks of one replica.

    `available` are the bytes that it may count on; None: its part of what is free now.
    Raises OutOfMemoryError if one sequence of max-model-len doesn't fit, naming the flags and values that would work.
    """
    rows, budget = _rows_and_budget(config, facts)
    block_size = config.block_size or BLOCK_SIZE
    ranks, warnings = config.tensor_parallel_size, list(facts.warnings)
    if ranks == 1:
        workspace = _workspace(facts, rows, budget, block_size)
    else:  # they share the machine: from here on, figures are sums over ranks
        split = plan_split(config, facts)
        warnings += split.warnings
        workspace = ranks * _workspace(split.rank, rows, budget, block_size)
        kv_bytes = ranks * split.rank.kv_bytes_per_token
        facts = dataclasses.replace(facts, weight_bytes=split.weight_bytes, kv_bytes_per_token=kv_bytes)
    replicas = config.data_parallel_size
    if available is None:
        available = available_memory() // replicas
    share = config.gpu_memory_utilization or UTILIZATION
    block_bytes = facts.kv_bytes_per_token * block_size
    windows = facts.kv_groups.windows
    per_sequence = blocks_of(facts.max_model_len, windows, budget, block_size)
    if config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // replicas // block_bytes
    else:
        room = int(share * available) - facts.weight_bytes - workspace
        blocks = min(max(room, 0) // block_bytes, rows * per_sequence + 1)
    if blocks < per_sequence + 1:
        raise OutOfMemoryError(_too_little(config, facts, blocks, (block_size, budget), (share, available, workspace)))
    resolved = ResolvedConfig(
        max_model_len=facts.max_model_len,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        block_size=block_size,
        num_blocks=blocks,
        kv_windows=windows,
        enable_prefix_caching=config.enable_prefix_caching and "no-prefix-cache" not in config.ablations,
        scheduling_policy=config.scheduling_policy,
        ablations=config.ablations,
        scheduler_steps=config.num_scheduler_steps or 1,
        draft_tokens=config.num_speculative_tokens if config.speculative else 0,
    )
    kv_flag = f"{KV_ALLOCATION}, --gpu-memory-utilization"
    memory = (
        MemoryLine("weights", facts.weight_bytes, "--dtype, --quantization"),
        MemoryLine("workspace", workspace, "--max-num-batched-tokens, --max-num-seqs"),
        MemoryLine("KV cache", blocks * block_bytes, kv_flag),
    )
    total = sum(line.bytes for line in memory)
    if total > available:
        warnings.append(
            f"{_size(total * replicas)} are planned but only {_size(available * replicas)} of memory are free: "
            f"lower {KV_ALLOCATION}{' or --dp' if replicas > 1 else ''}"
        )
    warnings += [*_slow_dtype(facts.dtype), *_more_ranks_than_cores(config)]
    sequences = min((blocks - 1) // per_sequence, rows)
    return Resolution(resolved, memory, tuple(warnings), _device(config), sequences)


def blocks_of(tokens: int, windows: tuple[int, ...], budget: int, block_size: int) -> int:
    """Most blocks that a request of so many tokens holds, over all KV groups."""
    all_of_them = -(-tokens // block_size)
    reach = max(budget, IN_FLIGHT)
    return sum(min(all_of_them, window_blocks(one, reach, block_size)) if one else all_of_them for one in windows)


def threads_per_rank(ranks: int) -> int:
    """Each rank's share of the cores; `ranks` are those of all replicas."""
    return max(1, cores() // ranks)


def _device(config: EngineConfig) -> str:
    ranks, threads = config.tensor_parallel_size, threads_per_rank(config.total_ranks)
    each = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"cpu ({each})" if ranks == 1 else f"cpu ({ranks} ranks of {each})"


def _rows_and_budget(config: EngineConfig, facts: ModelFacts) -> tuple[int, int]:
    """Where only one is given, the other adapts: each row needs a token of the budget."""
    rows, budget = config.max_num_seqs, config.max_num_batched_tokens
    if rows is None:
        rows = min(ROWS, budget or ROWS)
    if "no-chunking" in config.ablations:
        if budget is not None and budget < facts.max_model_len:
            raise ConfigError(
                f"without chunking a step must hold a whole prompt: --max-num-batched-tokens ({budget}) must not be "
                f"below --max-model-len ({facts.max_model_len})"
            )
        return rows, budget or max(WHOLE_PROMPTS, rows, facts.max_model_len)
    return rows, budget or max(BUDGET, rows + CHUNK)


def _workspace(facts: ModelFacts, rows: int, budget: int, block_size: int) -> int:
    """Upper bound of what a step allocates, from shapes."""
    item = ITEMSIZE[facts.dtype]
    query = facts.num_heads * facts.head_dim
    key_value = 2 * facts.num_kv_heads * facts.head_dim
    per_token = 4 * facts.hidden_size + 2 * facts.intermediate_size + 3 * query + 2 * key_value
    activations = budget * (per_token * item + 2 * facts.hidden_size * 4)
    logits = rows * facts.vocab_size * item + min(rows, MODEL_ROWS_IN_FLOAT) * facts.vocab_size * 4 * 4
    gathered = max(facts.max_model_len + block_size, 32 << 10) * key_value * item
    scores = QUERY_TILE * facts.num_heads * facts.max_model_len * (2 * 4 + 2 * item)
    return activations + logits + gathered + scores


def _too_little(
    config: EngineConfig, facts: ModelFacts, blocks: int, step: tuple[int, int], room: tuple[float, int, int]
) -> str:
    """`step`: tokens of a block, tokens of a step; `room`: the share of memory, of what, and the workspace."""
    (block_size, budget), (share, available, workspace) = step, room

    def blocks_for(tokens: int) -> int:
        return blocks_of(tokens, facts.kv_groups.windows, budget, block_size)

    needed = (blocks_for(facts.max_model_len) + 1) * block_size * facts.kv_bytes_per_token
    fits = bisect_right(range(1, facts.max_model_len), blocks - 1, key=blocks_for) // block_size * block_size
    replicas = config.data_parallel_size
    each = f" for each of {replicas} replicas" if replicas > 1 else ""
    if config.kv_cache_memory_bytes is not None:
        given = f"{KV_ALLOCATION} {config.kv_cache_memory_bytes} holds{each}"
        ways = [f"{KV_ALLOCATION} {needed * replicas}"]
    else:
        given = (
            f"{share:.0%} of {_size(available)} free memory{each} less {_size(facts.weight_bytes)} of weights and "
            f"{_size(workspace)} of workspace leaves room for"
        )
        enough = (facts.weight_bytes + workspace + needed) / max(available, 1)
        ways = [f"--gpu-memory-utilization {min(1.0, enough + 0.01):.2f}"] if enough <= 1 else []
    if fits > 0:
        ways.append(f"--max-model-len {fits}")
    if not ways:
        whole = replicas * (facts.weight_bytes + workspace + needed)
        ways.append(f"a machine with {_size(whole)} free, or a smaller model")
    if replicas > 1:
        ways.append("a lower --dp")
    return (
        f"one request of {facts.max_model_len} tokens needs {_size(needed)} of KV cache, but {given} "
        f"{max(fits, 0)} tokens: use {' or '.join(ways)}"
    )


def _more_ranks_than_cores(config: EngineConfig) -> list[str]:
    if config.total_ranks <= cores():
        return []
    ranks, replicas = config.tensor_parallel_size, config.data_parallel_size
    asked = [f"--tp {ranks}"] * (ranks > 1) + [f"--dp {replicas}"] * (replicas > 1)
    what = "ranks" if ranks > 1 else "replicas"
    return [f"{' '.join(asked)} on {cores()} cores: {what} take turns, fewer are faster"]


def _slow_dtype(dtype: str) -> list[str]:
    fast = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"amx_fp16", "avx512_fp16", "fphp"}}
    if dtype not in fast:
        return []
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []
    if fast[dtype] & set(flags):
        return []
    return [f"this CPU computes {dtype} slowly: --dtype float32 is faster if its memory suffices"]


def _size(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"
