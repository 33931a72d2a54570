"""An engine on simulated hardware in virtual time: what `redline bench`, `sweep` and `plan` see of it."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.config import INLINE_PROCESSING, NO_FEATURE_CACHE, EngineConfig
from engine.engine_plan import EnginePlan, plan_engine
from engine.errors import ConfigError
from engine.hardware.accuracy import simulation_mark
from engine.hardware.description import Hardware, Processing
from engine.hardware.images import ImageProcessing
from engine.hardware.simulation import ImageInputs, Simulation
from engine.hardware.start import config_fields, simulated_executor, used_hardware, with_short_messages

PROCESSORS = 8  # processes for images, without --mm-processors: a server with GPUs has cores enough for them
NO_PROCESSING = Processing("", megapixel_ms=0)  # of hardware whose description has no times for it


@dataclass(frozen=True, slots=True)
class SimulatedEngine:
    """A server without HTTP, and what is known of it.

    model: its name. title: of the hardware. described: the engine in one line. resolved: its choices as plain data, as
    a server reports them. mark: what result files say about the simulation. warnings: for the user.
    """

    simulation: Simulation
    model: str
    title: str
    described: str
    vocab_size: int
    resolved: dict[str, Any]
    mark: dict[str, Any]
    warnings: tuple[str, ...]


Simulate = Callable[[str, list[str]], SimulatedEngine]  # model and flags of `redline serve` -> the engine


def simulate(config: EngineConfig) -> SimulatedEngine:
    """The engine of a configuration whose device is `sim:NAME`; its time begins at 0.

    Raises ConfigError for options that can't be simulated, ModelError for a model that can't be read, OutOfMemoryError
    if one request of max-model-len does not fit.
    """
    plan = plan_engine(config)
    config, resolved, model_info = plan.config, plan.resolution.config, plan.model_info
    if resolved.pools:
        raise ConfigError(f"{config.name} pools, which is not simulated: choose a model that generates")
    hardware = used_hardware(config)
    simulation = Simulation(
        with_short_messages(resolved),
        lambda clock: simulated_executor(config, resolved, model_info, clock),
        request_s=hardware.host.of(config.engine).request_ms * 1e-3,
        replicas=config.data_parallel_size,
        routing=config.routing,
        seed=config.seed,
        images=_images(plan, hardware),
    )
    return SimulatedEngine(
        simulation, config.name, hardware.title, _described(plan), model_info.vocab_size, _resolved(plan),
        simulation_mark(config.simulated, config.engine), plan.resolution.warnings,
    )  # fmt: skip


def _images(plan: EnginePlan, hardware: Hardware) -> ImageInputs | None:
    """What becomes of images; None if the model takes none."""
    info, config, ablations = plan.model_info, plan.config, plan.resolution.config.ablations
    if info.mm is None:
        return None
    cached = NO_FEATURE_CACHE not in ablations and config.mm_cache_gb != 0
    processing = ImageProcessing(hardware.host.processing or NO_PROCESSING, _processors(plan) or 1, cached=cached)
    placeholder = min(info.mm.embedding_ids)
    return ImageInputs(config_fields(info), placeholder, processing, inline=INLINE_PROCESSING in ablations)


def _processors(plan: EnginePlan) -> int | None:
    """Processes for images beside the engine; None if its loop processes them, or the model takes none."""
    if plan.model_info.mm is None or INLINE_PROCESSING in plan.resolution.config.ablations:
        return None
    return plan.config.mm_processors or PROCESSORS


@contextlib.contextmanager
def without_core_log() -> Iterator[None]:
    """Nothing about preemptions on the screen: they are in the results."""
    log = logging.getLogger("redline.core")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _described(plan: EnginePlan) -> str:
    config, resolved = plan.config, plan.resolution.config
    tokens = (resolved.num_blocks - 1) * resolved.block_size
    replicas = f"{config.data_parallel_size} replicas of " if config.data_parallel_size > 1 else ""
    count = _processors(plan)
    processes = f", {count} process{'es' if count > 1 else ''} for images" if count is not None else ""
    return (
        f"{plan.resolution.device}: {replicas}{config.name}, {config.engine}, "
        f"up to {resolved.max_num_seqs} requests of {resolved.max_model_len:,} tokens, "
        f"{resolved.max_num_batched_tokens:,} tokens a step, {tokens:,} tokens of KV cache{processes}"
    )


def _resolved(plan: EnginePlan) -> dict[str, Any]:
    config, resolved = plan.config, plan.resolution.config
    found = {
        "device": plan.resolution.device,
        "engine": config.engine,
        "dtype": plan.model_info.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "data_parallel_size": config.data_parallel_size,
        "max_model_len": resolved.max_model_len,
        "max_num_seqs": resolved.max_num_seqs,
        "max_num_batched_tokens": resolved.max_num_batched_tokens,
        "block_size": resolved.block_size,
        "num_gpu_blocks": resolved.num_blocks - 1,
        "enable_prefix_caching": resolved.enable_prefix_caching,
        "ablations": ",".join(sorted(resolved.ablations)),
    }
    count = _processors(plan)
    return found if count is None else found | {"mm_processors": count}
