"""The EngineCore's process: started and ended by its parent, built in the child.

This is the only module that imports both the core and the worker. `engine.children` has the protocol between parent and
child.
"""

import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq
from msgspec.structs import replace

from engine import children
from engine.children import Failure, Loading, RankHandle, ReportingChild, Up
from engine.clock import Clock, MonotonicClock
from engine.config import STEP_TIMEOUT_S, EngineConfig
from engine.log_format import log_everything
from engine.messages import Ready, Shutdown, encode
from engine.multimodal.feature_files import FeatureFolder, remove_stale_features
from engine.phases import Phases
from engine.resolved_config import ResolvedConfig
from engine.socket_folder import SocketFolder

if TYPE_CHECKING:
    from engine.core.server import CoreServer
    from engine.engine_plan import EnginePlan
    from engine.frontend.grammar_vocabulary import GrammarVocabulary
    from engine.frontend.inline_front_end import InlineTexts
    from engine.memory import Resolution
    from engine.model.model_info import ModelInfo
    from engine.worker.executor import StartedExecutor

STOP_GRACE_S = 5.0  # before the child is killed


@dataclass(frozen=True, slots=True)
class Endpoints:
    """ZeroMQ addresses: the core binds `to_core`, front end i binds `from_core[i]`, the other side connects."""

    to_core: str
    from_core: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The folder of the sockets, which the parent removes."""
        return os.path.dirname(self.to_core.removeprefix("ipc://"))


class CoreOptions(children.PipeOptions):
    config: dict[str, Any]
    to_core: str
    from_core: tuple[str, ...]
    step_timeout_s: float
    memory: int | None  # bytes that the engine may use; None: what is free
    environment: dict[str, str]  # variables to set, see `engine.devices.machine.Machine.environment`
    spawned: float  # when the parent starts the process, on the monotonic clock


class CoreProcess:
    """The EngineCore in a process of its own.

    Args:
        step_timeout_s: timeout of the core's watchdog; 0: no watchdog.
        memory: bytes that the core may use if other cores start at the same time; None: what is free then.
        environment: variables that the core and its ranks have besides those of this process.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        front_ends: int = 1,
        step_timeout_s: float = STEP_TIMEOUT_S,
        memory: int | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        self._arguments: dict[str, Any] = {
            "front_ends": front_ends,
            "step_timeout_s": step_timeout_s,
            "memory": memory,
            "environment": environment,
        }
        self._config = config
        self.spawned = time.monotonic()
        self._folder = SocketFolder()
        self.endpoints = Endpoints(
            f"ipc://{self._folder.path}/core", tuple(f"ipc://{self._folder.path}/front-{i}" for i in range(front_ends))
        )
        self._expected_end = False
        self._up = False
        self._failure: Failure | None = None
        to_core, from_core = self.endpoints.to_core, self.endpoints.from_core
        self._child = ReportingChild(
            "engine.launch",
            CoreOptions(
                config.describe(), to_core, from_core, step_timeout_s, memory, dict(environment or {}), self.spawned
            ),
            name="the EngineCore",
            memory_advice="lower --kv-cache-memory-bytes",
        )

    def wait_ready(self, loading: Callable[[int, int], None] | None = None) -> Ready:
        """Block until the core is up. If it fails to start, its error is raised here.

        `loading` is called with the bytes of weights read so far and in total.
        """
        while isinstance(report := self._child.next_report(), Loading):
            if loading is not None:
                loading(report.done, report.total)
        if isinstance(report, Up):
            self._up = True
            ready: Ready = report.read(Ready)
            return ready
        self._failure = failure = report if isinstance(report, Failure) else None
        self._expected_end = True
        self._child.wait()
        self._clean()
        raise self._child.error(failure, named=False)

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call back from a thread, with the cause in one line, if the core exits unexpectedly."""

        def wait() -> None:
            report = self._child.next_report()
            self._failure = report if isinstance(report, Failure) else None
            self._child.wait()
            if not self._expected_end:
                on_death(str(self._child.error(self._failure, named=False)))

        threading.Thread(target=wait, name="core-watch", daemon=True).start()

    def successor(self, adapters: tuple[tuple[str, str], ...]) -> "CoreProcess":
        """A new core with the same options but for its adapters, at addresses of its own; the caller must `stop` this
        one."""
        return CoreProcess(dataclasses.replace(self._config, adapters=adapters), **self._arguments)

    def sibling(self, config: EngineConfig, environment: Mapping[str, str]) -> "CoreProcess":
        """The core of another replica of the same server."""
        return CoreProcess(config, **self._arguments | {"memory": None, "environment": environment})

    def stop(self) -> None:
        """End the core, and with it all requests; safe to call twice."""
        self._expected_end = True
        if not self._up:  # it has no request, and does not read messages yet
            self._child.kill()
            self._child.wait()
        elif self._child.returncode is None:
            self._send_shutdown()
            if not self._child.wait(STOP_GRACE_S):
                self._child.kill()
                self._child.wait()
        self._clean()

    def _send_shutdown(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(self.endpoints.to_core)
        socket.send(encode(Shutdown()))
        socket.close()
        context.term()

    def _clean(self) -> None:
        self._child.close()
        self._folder.remove()
        remove_stale_features()  # of a core that was killed


# ------------------------------------------------------------------------------------------------------ in the child


@dataclass(frozen=True, slots=True)
class BuiltCore:
    """A core that is ready to run."""

    server: "CoreServer"
    ready: Ready
    ranks: tuple[RankHandle, ...]  # empty if this process is the only rank
    features: FeatureFolder | None  # of a model that takes multimodal inputs


def build_core_server(
    config: EngineConfig,
    endpoints: Endpoints,
    progress: Callable[[int, int], None] | None = None,
    memory: int | None = None,
    phases: Phases | None = None,
) -> BuiltCore:
    """Plan memory, load the model, and build the core's server.

    Args:
        progress: called with the bytes of weights read so far and in total.
        memory: bytes that the engine may use; None: what is free.
        phases: of the start so far.
    """
    phases = Phases() if phases is None else phases
    from engine.worker.threads import limit_libraries

    limit_libraries()  # before anything below imports torch
    from engine.core.server import CoreServer
    from engine.engine_plan import plan_engine
    from engine.memory import with_measured

    phases.end("import the engine")
    if not config.simulated:
        import torch  # noqa: F401

        phases.end("import torch")
    plan = plan_engine(config, memory)
    config, model_info, resolution = plan.config, plan.model_info, plan.resolution
    phases.end("read the configuration")
    clock = MonotonicClock()
    executor = _start_executor(plan, endpoints, clock, progress)
    resolution = with_measured(resolution, executor.num_blocks, executor.memory, config.tensor_parallel_size)
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
    executor.ended.add_done_callback(lambda ended: server.fail(ended.exception()))
    return BuiltCore(server, ready, tuple(executor.ranks), features)


def _start_executor(
    plan: "EnginePlan", endpoints: Endpoints, clock: Clock, progress: Callable[[int, int], None] | None
) -> "StartedExecutor":
    config, model_info, resolved = plan.config, plan.model_info, plan.resolution.config
    if config.simulated:
        from engine.hardware.real_time import RealTimeExecutor
        from engine.hardware.start import simulated_executor

        return RealTimeExecutor(simulated_executor(config, resolved, model_info, clock), clock)
    from engine.worker.executor import make_executor

    return make_executor(config, model_info, resolved, folder=endpoints.folder, progress=progress)


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
    built = build_core_server(config, endpoints, lambda *loaded: send(Loading(*loaded)), options.memory, phases)

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


if __name__ == "__main__":
    sys.exit(main())
