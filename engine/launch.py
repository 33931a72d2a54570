"""Builds the processes of an engine and owns their start and end.

The EngineCore is a child that gets its orders on stdin (one msgpack map) and reports on a pipe: Ready, or the error
that ended it (see `engine.children`).
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from engine import children
from engine.children import Failure, framed, read_framed
from engine.clock import MonotonicClock
from engine.config import STEP_TIMEOUT_S, EngineConfig, ResolvedConfig
from engine.errors import EngineDeadError, RedlineError
from engine.messages import Ready, Shutdown, encode
from engine.socket_folder import SocketFolder

if TYPE_CHECKING:
    from engine.core.server import CoreServer
    from engine.frontend.inline import InlineTexts

STOP_GRACE_S = 5.0  # beyond the drain, before the child is ended by force
PROBE_S = 0.1


@dataclass(frozen=True, slots=True)
class Endpoints:
    """ZeroMQ addresses: the core binds `to_core`, front end i binds `from_core[i]`, the other side connects."""

    to_core: str
    from_core: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Where the sockets lie: the parent removes it, whatever became of the core."""
        return os.path.dirname(self.to_core.removeprefix("ipc://"))


class _Orders(msgspec.Struct):
    config: dict[str, Any]
    to_core: str
    from_core: tuple[str, ...]
    report_fd: int
    step_timeout_s: float
    memory: int | None  # bytes that the engine may count on; None: what is free


class _Up(msgspec.Struct, tag="up"):
    ready: Ready


class _Loading(msgspec.Struct, tag="loading"):
    done: int  # bytes of the weights
    total: int


_reports = msgspec.msgpack.Decoder(_Up | _Loading | Failure)


class CoreProcess:
    """The EngineCore in a process of its own; `step_timeout_s` is its watchdog's, 0 for none.

    `memory` are the bytes that it may count on, where it isn't the only one to start; None: what is free then.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        front_ends: int = 1,
        step_timeout_s: float = STEP_TIMEOUT_S,
        memory: int | None = None,
    ):
        self._folder = SocketFolder()
        self.endpoints = Endpoints(
            f"ipc://{self._folder.path}/core", tuple(f"ipc://{self._folder.path}/front-{i}" for i in range(front_ends))
        )
        self._expected_end = False
        self._up = False
        self._failure: Failure | None = None
        report_read, report_write = os.pipe()
        self._reports = os.fdopen(report_read, "rb")
        try:
            to_core, from_core = self.endpoints.to_core, self.endpoints.from_core
            orders = _Orders(config.describe(), to_core, from_core, report_write, step_timeout_s, memory)
            self._child = children.spawn("engine.launch", orders, (report_write,))
        finally:
            os.close(report_write)

    @property
    def process_id(self) -> int:
        return self._child.pid

    def wait_ready(
        self, on_wait: Callable[[], None] | None = None, loading: Callable[[int, int], None] | None = None
    ) -> Ready:
        """Block until the core is up, calling `on_wait` meanwhile; a failing start raises its own error here.

        `loading` hears, from a thread, how many bytes of the weights were read, and how many there are.
        """
        box: list[_Up | Failure | None] = []

        def read() -> None:
            while isinstance(report := self._next_report(), _Loading):
                if loading is not None:
                    loading(report.done, report.total)
            box.append(report)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(timeout=PROBE_S)
            if on_wait is not None:
                on_wait()
        report = box[0]
        if isinstance(report, _Up):
            self._up = True
            return report.ready
        self._failure = report
        self._expected_end = True
        self._child.wait()
        self._clean()
        raise self._error()

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call back from a thread, with the cause in one line, if the core ends without having been told to."""

        def wait() -> None:
            report = self._next_report()
            self._failure = report if isinstance(report, Failure) else None
            self._child.wait()
            if not self._expected_end:
                on_death(str(self._error()))

        threading.Thread(target=wait, name="core-watch", daemon=True).start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Let running requests finish for `drain_s`, then end the core; safe to call twice."""
        self._expected_end = True
        if not self._up:  # it listens to nobody yet, and has nothing to finish
            self._child.kill()
            self._child.wait()
        elif self._child.poll() is None:
            self._ask_to_end(drain_s)
            try:
                self._child.wait(drain_s + STOP_GRACE_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._clean()

    def _ask_to_end(self, drain_s: float) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(self.endpoints.to_core)
        socket.send(encode(Shutdown(drain_s)))
        socket.close()
        context.term()

    def _next_report(self) -> "_Up | _Loading | Failure | None":
        """The child's next report; None once it has closed its end."""
        return read_framed(self._reports, _reports)

    def _error(self) -> RedlineError:
        if self._failure is not None:
            return self._failure.error()
        end = children.how_it_ended(self._child, "lower --kv-cache-memory-bytes")
        return EngineDeadError(f"the EngineCore (process {self._child.pid}) {end}")

    def _clean(self) -> None:
        for stream in (self._child.stdin, self._reports):
            if stream is not None:
                stream.close()
        self._folder.remove()


# ------------------------------------------------------------------------------------------------------ in the child


@dataclass(frozen=True, slots=True)
class Built:
    """A core that could run."""

    server: "CoreServer"
    ready: Ready
    ranks: tuple[int, ...]  # their processes, where they aren't this one


def build_core_server(
    config: EngineConfig,
    endpoints: Endpoints,
    progress: Callable[[int, int], None] | None = None,
    memory: int | None = None,
) -> Built:
    """Load the model, plan memory, allocate, and build the server; `progress` hears how much of the weights is read."""
    from engine.worker.threads import limit_libraries

    limit_libraries()  # before anything below imports torch
    from engine.core.server import CoreServer
    from engine.length import fit_length
    from engine.memory import resolve
    from engine.model.facts import read_facts
    from engine.worker.executor import InProcessExecutor
    from engine.worker.multiprocess import MultiprocessExecutor

    start = time.monotonic()
    config, memory = fit_length(config, memory)
    facts = read_facts(config)
    resolution = resolve(config, facts, memory)
    ledger = [("read the configuration", time.monotonic() - start)]
    executor: InProcessExecutor | MultiprocessExecutor
    if config.tensor_parallel_size > 1:
        executor = MultiprocessExecutor(config, facts, resolution.config, folder=endpoints.folder, progress=progress)
    else:
        executor = InProcessExecutor(config, facts, resolution.config, progress=progress)
    ledger += executor.seconds.items()
    resolved = resolution.config
    inline = build_inline(config, resolved, facts.vocab_size) if "inline-frontend" in resolved.ablations else None
    server = CoreServer(resolved, executor, MonotonicClock(), endpoints.to_core, endpoints.from_core, inline)
    began = time.monotonic()
    for name, path in config.adapters:
        server.core.load_adapter(name, path).result()
    if config.adapters:
        ledger.append(("load adapters", time.monotonic() - began))
    ranks: tuple[int, ...] = ()
    if isinstance(executor, MultiprocessExecutor):
        ranks = tuple(executor.process_ids)
        executor.ended.add_done_callback(lambda ended: server.fail(ended.exception()))
    ready = Ready(
        model_path=str(facts.path),
        device=resolution.device,
        dtype=facts.dtype,
        vocab_size=facts.vocab_size,
        max_model_len=resolved.max_model_len,
        max_num_seqs=resolved.max_num_seqs,
        max_num_batched_tokens=resolved.max_num_batched_tokens,
        block_size=resolved.block_size,
        num_blocks=resolved.num_blocks - 1,
        prefix_caching=resolved.enable_prefix_caching,
        memory=resolution.memory,
        warnings=(*resolution.warnings, *executor.warnings),
        process_id=os.getpid(),
        seconds=tuple(ledger),
        scheduling_policy=resolved.scheduling_policy,
        ablations=tuple(sorted(resolved.ablations)),
        scheduler_steps=resolved.scheduler_steps,
        kernels=executor.kernels,
        kv_windows=resolved.kv_windows,
        sequences=resolution.sequences,
    )
    return Built(server, ready, ranks)


def build_inline(config: EngineConfig, resolved: ResolvedConfig, vocab_size: int) -> "InlineTexts":
    """The front end within the core's loop, with the model's tokenizer."""
    from pathlib import Path

    from engine.frontend.inline import InlineTexts
    from engine.frontend.tokenizer import load_tokenizer

    folder = Path(config.tokenizer or config.model)
    tokenizer, _ = load_tokenizer(folder, vocab_size, config.tokenizer_mode, config.chat_template)
    return InlineTexts(tokenizer, resolved.max_model_len, vocab_size)


def main() -> int:
    """The EngineCore's process, from orders on stdin to its end."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(name)s: %(message)s")
    children.leave_signals_to_parent()
    orders = read_framed(sys.stdin.buffer, msgspec.msgpack.Decoder(_Orders))
    if orders is None:
        return 1
    children.end_with_parent()
    with os.fdopen(orders.report_fd, "wb") as report:

        def tell(message: _Up | _Loading | Failure) -> None:
            report.write(framed(message))
            report.flush()

        def run() -> None:
            endpoints = Endpoints(orders.to_core, orders.from_core)
            built = build_core_server(
                EngineConfig(**orders.config), endpoints, lambda *loaded: tell(_Loading(*loaded)), orders.memory
            )

            def give_up(cause: str) -> None:
                # What hangs can't be waited for: ranks and this process end at once, the cause first.
                tell(Failure("EngineDeadError", cause))
                for process in built.ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                os._exit(1)

            if orders.step_timeout_s > 0:
                built.server.watch(orders.step_timeout_s, give_up, built.ranks)
            children.settle()
            tell(_Up(built.ready))
            built.server.run()

        return children.run_reporting(run, tell, "the EngineCore")


if __name__ == "__main__":
    sys.exit(main())
