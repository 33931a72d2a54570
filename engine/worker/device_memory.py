"""Chooses the number of KV blocks by measuring what is left once the weights are on the device.

The largest step runs on a small cache, first launched kernel by kernel, then captured. It computes padding, so it needs
as much memory as any step of its size and changes nothing. All other captured steps share the memory of the largest.

    total │ share that isn't used │ other processes │ weights, slots │ workspace │ CUDA graphs │ KV blocks
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.errors import OutOfMemoryError, cause_of
from engine.memory import block_limits
from engine.messages import MemoryLine
from engine.model.model_info import ITEMSIZE
from engine.text import human_bytes
from engine.worker.device import Device, DeviceMemory
from engine.worker.device_assembly import Assembled, Assembly
from engine.worker.device_runner import DeviceRunner

PROBE_BLOCKS = 2  # of the small cache
BYTES_PER_GRAPH = 4 << 20  # assumed, for each captured step beside the largest; not measured
FEWER_BLOCKS = 20  # a twentieth less after the cache did not fit


@dataclass(frozen=True, slots=True)
class MeasuredRunner:
    """A runner, its number of KV blocks, and what the start table shows."""

    runner: DeviceRunner
    num_blocks: int
    memory: tuple[MemoryLine, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Measured:
    """Bytes. left: for KV blocks and graphs; graphs: of all sizes. refusal: why nothing is captured, if it failed."""

    total: int
    left: int
    workspace: int
    graphs: int = 0
    refusal: str = ""


def build_measured(assembly: Assembly, choose_blocks: bool, utilization: float) -> MeasuredRunner:
    """Build a runner with as many KV blocks as fit, or with those that are planned.

    Args:
        choose_blocks: whether the number of blocks is chosen here.
        utilization: share of the device's memory that may be used.

    Raises OutOfMemoryError with figures if one request of max-model-len does not fit.
    """
    planned, device, agree = assembly.resolved.num_blocks, assembly.device, assembly.agree
    if not assembly.use_triton or device.memory() is None:
        return MeasuredRunner(assembly.build(planned).runner, planned)
    measured = _measure(assembly, utilization)
    gc.collect()  # the runner of the small cache has reference cycles
    device.release_memory()
    if not agree(int(not measured.refusal)):
        assembly = assembly.without_graphs()
        measured = replace(measured, refusal=measured.refusal or "another rank can't capture its steps", graphs=0)
    num_blocks = planned
    warnings = [f"CUDA graphs are off: {measured.refusal}"] if measured.refusal else []
    block = assembly.model_info.kv_bytes_per_token * assembly.resolved.block_size
    if choose_blocks:
        least, most = block_limits(assembly.resolved)
        num_blocks = agree(min((measured.left - measured.graphs) // block, most))
        if num_blocks < least and measured.graphs:
            warnings.append(
                f"CUDA graphs are off: they need {human_bytes(measured.graphs)}, and one request of "
                f"{assembly.resolved.max_model_len} tokens would not fit"
            )
            assembly = assembly.without_graphs()
            num_blocks = agree(min(measured.left // block, most))
        if num_blocks < least:
            raise OutOfMemoryError(_too_little(assembly, measured, least * block, utilization))
    built, num_blocks = _build_within(assembly, num_blocks, block, agree)
    workspace = measured.workspace - _encoder_bytes(assembly)  # which has lines of its own
    lines = [MemoryLine("workspace (measured)", workspace, "--max-num-batched-tokens, --max-num-seqs")]
    if built.graphs is not None:
        lines.append(MemoryLine("CUDA graphs", measured.graphs, "--enforce-eager"))
    return MeasuredRunner(built.runner, num_blocks, tuple(lines), tuple(warnings))


def _measure(assembly: Assembly, utilization: float) -> _Measured:
    """Run the largest step on a small cache, and capture it."""
    device = assembly.device
    device.release_memory()
    loaded = _memory(device)
    try:
        probe = assembly.build(PROBE_BLOCKS)
        before = _memory(device)
        probe.run_largest()
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the largest step does not fit: {human_bytes(loaded.free_bytes)} of {human_bytes(loaded.total_bytes)} "
            f"were free after loading the weights: lower --max-num-batched-tokens or --max-num-seqs ({cause_of(error)})"
        ) from error
    workspace = _memory(device).peak_bytes - before.used_bytes + _draft_bytes(assembly) + _encoder_bytes(assembly)
    device.release_memory()
    after = _memory(device)
    cache = PROBE_BLOCKS * assembly.model_info.kv_bytes_per_token * assembly.resolved.block_size
    free = after.free_bytes + after.used_bytes - before.used_bytes + cache
    left = max(free - workspace - int((1 - utilization) * after.total_bytes), 0)
    if probe.graphs is None:
        return _Measured(after.total_bytes, left, workspace)
    largest, *others = probe.sizes.in_capture_order
    try:
        probe.graphs.capture(largest)
    except Exception as error:  # whatever a model does that can't be captured, its steps can run
        return _Measured(after.total_bytes, left, workspace, refusal=cause_of(error))
    device.release_memory()  # what the runs before the capture took
    graphs = max(after.free_bytes - _memory(device).free_bytes, 0) + len(others) * BYTES_PER_GRAPH
    return _Measured(after.total_bytes, left, workspace, graphs)


def _draft_bytes(assembly: Assembly) -> int:
    """Bytes of the logits at draft tokens, which the largest captured step doesn't have."""
    model_info, resolved = assembly.model_info, assembly.resolved
    return resolved.max_num_seqs * resolved.draft_tokens * model_info.vocab_size * ITEMSIZE[model_info.dtype]


def _encoder_bytes(assembly: Assembly) -> int:
    """Bytes of the encoder cache, and of the largest input while it is encoded; the largest step has no inputs."""
    mm, resolved = assembly.model_info.mm, assembly.resolved
    if mm is None:
        return 0
    tokens = resolved.encoder_cache_tokens or max(resolved.max_num_batched_tokens, mm.most_tokens)
    return tokens * mm.embedding_bytes + mm.encoder_workspace


def _memory(device: Device) -> DeviceMemory:
    memory = device.memory()
    assert memory is not None
    return memory


def _build_within(
    assembly: Assembly, num_blocks: int, block: int, agree: Callable[[int], int]
) -> tuple[Assembled, int]:
    """Build the runner; if the cache does not fit after all on any rank, once more with fewer blocks on all."""
    built = _try_to_build(assembly, num_blocks)
    if agree(int(built is not None)) and built is not None:
        return built, num_blocks
    del built
    assembly.device.release_memory()
    fewer = max(num_blocks - num_blocks // FEWER_BLOCKS, block_limits(assembly.resolved)[0])
    built = _try_to_build(assembly, fewer)
    if agree(int(built is not None)) and built is not None:
        return built, fewer
    raise OutOfMemoryError(
        f"a KV cache of {human_bytes(fewer * block)} does not fit, {human_bytes(_memory(assembly.device).free_bytes)} "
        "are free: lower --gpu-memory-utilization or --kv-cache-memory-bytes"
    )


def _try_to_build(assembly: Assembly, num_blocks: int) -> Assembled | None:
    """None if the device has too little memory."""
    try:
        return assembly.build(num_blocks)
    except torch.OutOfMemoryError:
        return None


def _too_little(assembly: Assembly, measured: _Measured, needed: int, utilization: float) -> str:
    return (
        f"one request of {assembly.resolved.max_model_len} tokens needs {human_bytes(needed)} of KV cache, but "
        f"{utilization:.0%} of {human_bytes(measured.total)} less weights and {human_bytes(measured.workspace)} of "
        f"workspace (measured) leave {human_bytes(measured.left)}: lower --max-model-len or --max-num-batched-tokens, "
        "or raise --gpu-memory-utilization"
    )
