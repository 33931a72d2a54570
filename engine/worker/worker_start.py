"""Starts the worker of one rank: libraries, model, kernels, KV cache."""

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from engine.config import DRIVER_BROADCAST, EngineConfig
from engine.host import threads_per_rank
from engine.messages import MemoryLine
from engine.model.model_info import ModelInfo
from engine.model.sharding.pipeline_plan import PipelinePlan, plan_pipeline
from engine.model.sharding.tp_plan import plan_tensor_parallel
from engine.model.stage import Stage
from engine.phases import Phases
from engine.resolved_config import ResolvedConfig
from engine.worker.rank_protocol import DeviceKind
from engine.worker.threads import limit_libraries, pin_thread

if TYPE_CHECKING:
    from engine.model.loading.meta_model import MetaModel
    from engine.worker.backend_builder import BuiltBackend
    from engine.worker.device import Device
    from engine.worker.device_runner import DeviceRunner
    from engine.worker.driver_broadcast import Follower
    from engine.worker.pooling_runner import BuiltPooling, PoolingRunner
    from engine.worker.pooling_stages import PoolingStageRunner
    from engine.worker.runner import Runner
    from engine.worker.stage_links import StageLinks
    from engine.worker.stage_runners import StageRunner

    Worker: TypeAlias = Runner | Follower | PoolingRunner | StageRunner | PoolingStageRunner

Progress = Callable[[int, int], None]  # bytes read, bytes in all


class StartReport(msgspec.Struct):
    """What the start table shows of a rank's start."""

    seconds: dict[str, float]  # by phase
    kernels: str
    warnings: tuple[str, ...]
    num_blocks: int | None = None  # of the KV cache, if it was chosen by measuring
    memory: tuple[MemoryLine, ...] = ()  # as measured
    captures: bool = False  # whether steps are left to be captured


@dataclass(frozen=True, slots=True)
class RankPlace:
    """The place of a rank among several."""

    rank: int
    store: str  # where the ranks find each other, see rank_store.py


def start_worker(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    progress: Progress | None = None,
    place: RankPlace | None = None,
) -> "tuple[Worker, StartReport]":
    """Load a rank's part of the model and allocate its KV cache; with a place, also join the other ranks.

    The calling thread must be the one that runs steps: it may be pinned to a core.
    """
    phases = Phases()
    limit_libraries()
    import torch

    from engine.model.loading.open_model import open_model
    from engine.worker.backend_builder import open_for_backend
    from engine.worker.runner import build_runner

    torch.set_num_threads(threads_per_rank(config.total_ranks))
    phases.end("import torch")
    stages = _plan_stages(config, model_info)
    if stages is not None and progress is not None:
        progress = partial(_report_share, progress, stages.shares[0])
    # Only the class has a plan by which tensor-parallel ranks divide it.
    opened = open_for_backend(config, model_info, resolved, progress) if config.tensor_parallel_size == 1 else None
    meta_model = opened or open_model(config, model_info, progress)
    worker: Worker
    built: BuiltBackend | BuiltPooling
    if model_info.pooling is not None and stages is None:
        from engine.worker.pooling_runner import build_pooling_runner

        phases.end("open model")
        worker, built = build_pooling_runner(config, model_info, resolved, meta_model)
    elif place is None:
        phases.end("open model")
        worker, built = build_runner(config, model_info, resolved, meta_model)
    else:
        worker, built = _build_placed(config, model_info, resolved, meta_model, place, stages, phases)
    pin_thread(built.cores)
    phases.end("load weights", meta_model.seconds)
    phases.end("prepare kernels")
    return worker, StartReport(phases.seconds, built.kernels, built.warnings)


def _plan_stages(config: EngineConfig, model_info: ModelInfo) -> PipelinePlan | None:
    """How pipeline stages divide the model; None with one stage."""
    return plan_pipeline(config, model_info) if config.pipeline_parallel_size > 1 else None


def _report_share(progress: Progress, share: float, done: int, total: int) -> None:
    """Report the progress of a stage that reads a share of the weights."""
    own = int(total * min(share, 1.0))
    progress(min(done, own), own)


def _build_placed(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: "MetaModel",
    place: RankPlace,
    stages: PipelinePlan | None,
    phases: Phases,
) -> "tuple[Worker, BuiltBackend]":
    """Join the other ranks, and build the runner of this rank's part of the model."""
    from engine.worker.gloo_group import GlooGroup
    from engine.worker.runner import build_runner

    ranks = config.tensor_parallel_size
    number, rank = divmod(place.rank, ranks)
    tp_plan = plan_tensor_parallel(config, model_info) if ranks > 1 else None
    phases.end("open model")
    group = GlooGroup(rank, ranks, f"{place.store}-{number}") if ranks > 1 else None
    links = None if stages is None else _join_stages(stages.stages[number], resolved, f"{place.store}-stages-{rank}")
    if group is not None:
        atexit.register(group.close)
    phases.end("join ranks")
    if tp_plan is not None and group is not None:
        from engine.model.sharding.shard_model import shard_model

        shard_model(meta_model, tp_plan, group)
        model_info = tp_plan.rank_info
    if stages is not None and links is not None:
        from engine.worker.stage_start import build_stage_runner

        return build_stage_runner(config, stages.rank_info(number, model_info), resolved, meta_model, tp_plan, links)
    if tp_plan is not None and group is not None and DRIVER_BROADCAST in config.ablations:
        from engine.worker.driver_broadcast import build_driven

        return build_driven(config, model_info, resolved, meta_model, tp_plan, group)
    return build_runner(config, model_info, resolved, meta_model, tp_plan)


def _join_stages(stage: Stage, resolved: ResolvedConfig, store: str) -> "StageLinks":
    from engine.worker.stage_links import StageGroup, StageLinks

    group = StageGroup(stage.number, stage.count, store)
    atexit.register(group.close)
    return StageLinks(stage, group, resolved.most_steps_in_flight)


def device_start(
    kind: DeviceKind, place: RankPlace | None = None
) -> "Callable[[EngineConfig, ModelInfo, ResolvedConfig, Progress | None], tuple[DeviceRunner, StartReport]]":
    """The function that starts a rank on a device: as `start_worker`, in the thread that runs steps."""

    def start(
        config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, progress: Progress | None = None
    ) -> "tuple[DeviceRunner, StartReport]":
        phases = Phases()
        limit_libraries()
        from engine.model.loading.open_model import open_model
        from engine.model.sharding.shard_model import shard_model
        from engine.worker.device_builder import build_device_runner

        phases.end("import torch")
        device = _make_device(kind.torch_type, 0 if place is None or kind.alone else place.rank)
        meta_model = open_model(config, model_info, progress)
        tp_plan = None if place is None else plan_tensor_parallel(config, model_info)
        phases.end("open model")
        if place is not None and tp_plan is not None:
            group = device.join(place.rank, tp_plan.size, place.store)
            phases.end("join ranks")
            shard_model(meta_model, tp_plan, group)
            model_info = tp_plan.rank_info
        built = build_device_runner(
            config, model_info, resolved, meta_model, device, tp_plan,
            use_triton=kind.use_triton, memory_utilization=kind.memory_utilization,
        )  # fmt: skip
        phases.end("load weights", meta_model.seconds)
        phases.end("prepare kernels")
        runner = built.runner
        return runner, StartReport(
            phases.seconds, built.kernels, built.warnings, built.num_blocks, built.memory, runner.captures
        )

    return start


def _make_device(torch_type: str, number: int) -> "Device":
    """A rank's device: with several of the type, the one of this number among those that are visible."""
    if torch_type == "cuda":
        from engine.worker.cuda_device import CudaDevice

        return CudaDevice(number)
    from engine.worker.torch_device import TorchDevice

    return TorchDevice(torch_type)
