"""The EngineCore's process: core and executor are built, and the core serves until its parent ends it.

This is the only module that imports both the core and the worker.
"""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from engine import children
from engine.block_files import check_folder
from engine.children import Failure, Loading, RankHandle, Up
from engine.clock import Clock, MonotonicClock
from engine.config import EngineConfig
from engine.core_process import CoreOptions, Endpoints
from engine.executor_backend import RAY
from engine.kv_spill import parse_kv_spill
from engine.kv_transfer import KVTcp
from engine.log_format import log_everything
from engine.messages import Ready
from engine.multimodal.feature_files import FeatureFolder
from engine.phases import Phases
from engine.ray_cluster import Reservation
from engine.resolved_config import ResolvedConfig

if TYPE_CHECKING:
    from engine.core.block_link import BlockLink
    from engine.core.server import CoreServer
    from engine.core.spill_start import SpillStore
    from engine.engine_plan import EnginePlan
    from engine.frontend.grammar_vocabulary import GrammarVocabulary
    from engine.frontend.inline_front_end import InlineTexts
    from engine.memory import Resolution
    from engine.model.model_info import ModelInfo
    from engine.worker.executor import StartedExecutor
    from engine.worker.ray_hosts import RayHosts


@dataclass(frozen=True, slots=True)
class BuiltCore:
    """A core that is ready to run."""

    server: "CoreServer"
    ready: Ready
    ranks: tuple[RankHandle, ...]  # empty if this process is the only rank
    features: FeatureFolder | None  # of a model that takes multimodal inputs
    spill: "SpillStore | None"  # with --kv-spill
    link: "BlockLink | None"  # to other replicas, with prefill/decode disaggregation


def build_core_server(
    config: EngineConfig,
    endpoints: Endpoints,
    progress: Callable[[int, int], None] | None = None,
    memory: int | None = None,
    phases: Phases | None = None,
    reservation: Reservation | None = None,
    kv_tcp: KVTcp | None = None,
) -> BuiltCore:
    """Plan memory, load the model, and build the core's server.

    Args:
        progress: called with the bytes of weights read so far and in total.
        memory: bytes that the engine may use; None: what is free.
        phases: of the start so far.
        reservation: as of CoreOptions.
        kv_tcp: how other replicas are reached if they run elsewhere.
    """
    phases = Phases() if phases is None else phases
    from engine.worker.threads import limit_libraries

    limit_libraries()  # before anything below imports torch
    from engine.core.server import CoreServer
    from engine.memory import with_measured

    phases.end("import the engine")
    if not config.simulated:
        import torch  # noqa: F401

        phases.end("import torch")
    plan, hosts = _plan(config, memory, phases, reservation)
    config, model_info, resolution = plan.config, plan.model_info, plan.resolution
    if config.kv_spill is not None and hosts is None and (path := parse_kv_spill(config.kv_spill).disk_path):
        check_folder(path)  # loading may take minutes
    clock = MonotonicClock()
    executor = _start_executor(plan, endpoints, clock, progress, hosts)
    resolution = with_measured(resolution, executor.num_blocks, executor.memory, config.num_ranks)
    resolved = resolution.config
    phases.add(executor.seconds, "start the executor")
    ready, features = _ready(config, model_info, resolution, executor), None
    if ready.mm is not None:
        features = FeatureFolder()
        ready = replace(ready, mm=replace(ready.mm, folder=features.path))
    folder = None if features is None else features.path
    inline = build_inline(config, resolved, ready)
    addresses = endpoints.to_core, endpoints.from_core
    vocabulary = partial(_load_vocabulary, config, ready.vocab_size)
    server = CoreServer(
        resolved, executor, clock, *addresses, inline, feature_folder=folder, load_vocabulary=vocabulary
    )
    phases.end("start the core")
    for name, path in config.adapters:
        server.core.load_adapter(name, path).result()
    if config.adapters:
        phases.end("load adapters")
    spill = link = None
    if resolved.host_blocks or resolved.role:
        where = kv_tcp or endpoints.folder
        spill, link = _attach_host_blocks(config, resolved, model_info, executor, server, where)
        phases.end("attach host blocks")
    if link is not None:
        ready = replace(ready, role=resolved.role, kv_address=link.address, kv_layout=link.layout)
    executor.ended.add_done_callback(lambda ended: server.fail(ended.exception()))
    return BuiltCore(server, ready, tuple(executor.ranks), features, spill, link)


def _attach_host_blocks(
    config: EngineConfig,
    resolved: ResolvedConfig,
    model_info: "ModelInfo",
    executor: "StartedExecutor",
    server: "CoreServer",
    where: str | KVTcp,
) -> "tuple[SpillStore | None, BlockLink | None]":
    """Where KV blocks go outside of the KV cache: the tiers of --kv-spill, and other replicas with a role."""
    from engine.core.block_link import BlockLink
    from engine.core.spill_start import SpillStore
    from engine.kv_format import KVLayout
    from engine.model.fingerprint import files_fingerprint

    model = files_fingerprint(model_info.path)
    layout = KVLayout.of(config, resolved, model, model_info.dtype, executor.kernels)
    spill = link = None
    if resolved.host_blocks:
        spill = SpillStore(config, resolved, layout, executor, server.core.scheduler, server.wake)
    if resolved.role:
        memory = None if spill is None else spill.host
        link = BlockLink(server.core, layout, executor, memory, where, server.wake)
    return spill, link


def _plan(
    config: EngineConfig, memory: int | None, phases: Phases, reservation: Reservation | None
) -> "tuple[EnginePlan, RayHosts | None]":
    """Plan the engine, and reserve the machines of its ranks; None if all ranks run on this one."""
    from engine.engine_plan import plan_engine

    hosts = machine = None
    if config.distributed_executor_backend == RAY:
        from engine.worker.executor import reserve_hosts

        hosts = reserve_hosts(config, reservation)
        machine = hosts.machine
        memory = hosts.available_memory if memory is None else memory
        phases.end("reserve Ray nodes")
    plan = plan_engine(config, memory, machine)
    if hosts is not None:
        device = f"{plan.resolution.device} on {hosts.description}"
        plan = dataclasses.replace(plan, resolution=dataclasses.replace(plan.resolution, device=device))
    phases.end("read the configuration")
    return plan, hosts


def _start_executor(
    plan: "EnginePlan",
    endpoints: Endpoints,
    clock: Clock,
    progress: Callable[[int, int], None] | None,
    hosts: "RayHosts | None",
) -> "StartedExecutor":
    config, model_info, resolved = plan.config, plan.model_info, plan.resolution.config
    if config.simulated:
        from engine.hardware.real_time import RealTimeExecutor
        from engine.hardware.start import simulated_executor

        return RealTimeExecutor(simulated_executor(config, resolved, model_info, clock), clock)
    from engine.worker.executor import make_executor

    return make_executor(config, model_info, resolved, folder=endpoints.folder, progress=progress, hosts=hosts)


def _ready(
    config: EngineConfig,
    model_info: "ModelInfo",
    resolution: "Resolution",
    executor: "StartedExecutor",
) -> Ready:
    """What a core reports to its parent, without the seconds of its start."""
    resolved = resolution.config
    return Ready(
        model_path=str(model_info.path),
        device=resolution.device,
        dtype=model_info.dtype,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        vocab_size=model_info.vocab_size,
        max_model_len=resolved.max_model_len,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        block_size=resolved.block_size,
        num_blocks=resolved.num_blocks - 1,
        prefix_caching=resolved.enable_prefix_caching,
        memory=resolution.memory,
        warnings=(*resolution.warnings, *executor.warnings),
        process_id=os.getpid(),
        scheduling_policy=resolved.scheduling_policy,
        ablations=tuple(sorted(resolved.ablations)),
        scheduler_steps=resolved.scheduler_steps,
        kernels=executor.kernels,
        kv_windows=resolved.kv_windows,
        sequences=resolution.sequences,
        tile_table=resolved.tile_table,
        mm=None if model_info.mm is None else model_info.mm.spec,
        pooling=model_info.pooling,
        simulated=resolution.simulated,
        budget_source=resolution.budget_source,
        spilled_blocks=(resolved.host_blocks, resolved.disk_blocks),
    )


def _load_vocabulary(config: EngineConfig, vocab_size: int) -> "GrammarVocabulary":
    """The model's tokens for grammars; the core itself needs no tokenizer."""
    from pathlib import Path

    from engine.frontend.grammar_vocabulary import GrammarVocabulary
    from engine.frontend.tokenizer import load_tokenizer

    folder = Path(config.tokenizer or config.model)
    tokenizer, _ = load_tokenizer(folder, vocab_size, config.tokenizer_mode, config.chat_template)
    return GrammarVocabulary(tokenizer, vocab_size)


def build_inline(config: EngineConfig, resolved: ResolvedConfig, ready: Ready) -> "InlineTexts | None":
    """The front end inside the core's loop (`--ablate inline-frontend`, `inline-processing`); None without these."""
    if not (ready.inline or (ready.processes_inline and ready.mm is not None)):
        return None
    from pathlib import Path

    from engine.frontend.inline_front_end import InlineTexts
    from engine.frontend.tokenizer import load_tokenizer

    folder = Path(config.tokenizer or config.model)
    tokenizer, _ = load_tokenizer(folder, ready.vocab_size, config.tokenizer_mode, config.chat_template)
    inputs = None
    if ready.mm is not None:
        from engine import processor_start
        from engine.frontend.inline_inputs import InlineInputs
        from engine.frontend.mm_pipeline import make_mm_options
        from engine.multimodal.hashing import InputHasher

        options = make_mm_options(config)
        hasher = InputHasher(Path(options.folder), ready.mm.family, options.processor_options)
        inputs = InlineInputs(ready.mm, tokenizer, hasher, options.limits, lambda: processor_start.make(options.model))
        if ready.processes_inline:
            inputs.load()
    return InlineTexts(tokenizer, resolved.max_model_len, ready.vocab_size, inputs, detokenizes=ready.inline)


def main() -> int:
    """The EngineCore's process, from the options on stdin to its end."""
    log_everything(logging.INFO)
    options = children.read_options(CoreOptions)
    if options is None:
        return 1
    children.end_with_parent()
    with children.reports_to(options.report_fd) as send:
        return children.run_reporting(lambda: _run(options, send), send, "the EngineCore")


def _run(options: CoreOptions, send: children.Send) -> None:
    os.environ.update(options.environment)  # before anything asks for devices
    phases = Phases(options.spawned)
    phases.end("start the EngineCore's process")
    endpoints = Endpoints(options.to_core, options.from_core)
    config = EngineConfig(**options.config)

    def loading(done: int, total: int) -> None:
        send(Loading(done, total))

    built = build_core_server(config, endpoints, loading, options.memory, phases, options.reservation, options.kv_tcp)

    def give_up(cause: str) -> None:
        # A hanging step can't be waited for: report the cause, then end the ranks and this process at once.
        send(Failure("EngineDeadError", cause))
        for rank in built.ranks:
            rank.kill()
        os._exit(1)

    if options.step_timeout_s > 0:
        built.server.watch(options.step_timeout_s, give_up, built.ranks)
    children.freeze_heap()
    phases.end("start the core")
    send(Up.of(replace(built.ready, seconds=tuple(phases.seconds.items()))))
    try:
        built.server.run()
    finally:
        if built.features is not None:
            built.features.remove()
        if built.spill is not None:
            built.spill.close()
        if built.link is not None:
            built.link.close()


if __name__ == "__main__":
    sys.exit(main())
