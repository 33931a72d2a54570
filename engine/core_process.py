"""The EngineCore's process as its parent sees it: started, watched and ended.

`engine.launch` has the process itself, `engine.children` the protocol between the two.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from engine import children
from engine.children import Failure, Loading, ReportingChild, Up
from engine.config import STEP_TIMEOUT_S, EngineConfig
from engine.errors import ConfigError, OutOfMemoryError
from engine.executor_backend import BACKEND, RAY
from engine.kv_transfer import KVTcp
from engine.messages import Ready, Shutdown, encode
from engine.multimodal.feature_files import remove_stale_features
from engine.ray_cluster import Reservation
from engine.socket_folder import SocketFolder
from engine.text import human_bytes

if TYPE_CHECKING:
    from engine.frontend.transport import CoreAddress

STOP_GRACE_S = 5.0  # before the child is killed


@dataclass(frozen=True, slots=True)
class Endpoints:
    """ZeroMQ addresses: the core binds `to_core`, front end i binds `from_core[i]`, the other side connects."""

    to_core: str
    from_core: tuple[str, ...]

    @classmethod
    def in_folder(cls, folder: str, front_ends: int) -> "Endpoints":
        """Unix sockets in a folder."""
        return cls(f"ipc://{folder}/core", tuple(f"ipc://{folder}/front-{number}" for number in range(front_ends)))

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
    reservation: Reservation | None = None  # of Ray nodes for its ranks; None: it reserves them itself, if it needs any
    kv_tcp: KVTcp | None = None  # if other replicas run elsewhere


class Core(Protocol):
    """An EngineCore, wherever it runs, as its server sees it."""

    spawned: float  # when it was started, on the monotonic clock

    def wait_ready(self, loading: Callable[[int, int], None] | None = None) -> Ready:
        """Block until it is up. If it fails to start, its error is raised here.

        `loading` is called with the bytes of weights read so far and in total.
        """
        ...

    def address(self, front_end: int, ready: Ready) -> "CoreAddress":
        """The addresses at which a front end reaches it; it has reported `ready`."""
        ...

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call back from a thread, with the cause in one line, if it exits unexpectedly."""
        ...

    def successor(self, adapters: tuple[tuple[str, str], ...]) -> "Core":
        """A new core with the same options but for its adapters; the caller must `stop` this one."""
        ...

    def sibling(self, config: EngineConfig, needed: int) -> "Core":
        """The core of another replica of the same server, which needs so many bytes.

        Raises OutOfMemoryError if they are not free, ConfigError if there is no device or no node for it.
        """
        ...

    def stop(self) -> None:
        """End it, and with it all requests; safe to call twice."""
        ...


class CoreProcess:
    """The EngineCore in a process of its own; implements Core.

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
        self.endpoints = Endpoints.in_folder(self._folder.path, front_ends)
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

    def address(self, front_end: int, ready: Ready) -> "CoreAddress":
        """The addresses at which a front end reaches the core, which has reported `ready`."""
        from engine.frontend.transport import CoreAddress

        return CoreAddress(ready, self.endpoints.to_core, self.endpoints.from_core[front_end])

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

    def sibling(self, config: EngineConfig, needed: int) -> "CoreProcess":
        """The core of another replica of the same server, which needs so many bytes; see Core."""
        environment, memory = share_left(config, needed)
        return CoreProcess(config, **self._arguments | {"memory": memory, "environment": environment})

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


def share_left(config: EngineConfig, needed: int) -> tuple[dict[str, str], int | None]:
    """What a replica that is added has of this machine: variables of its processes, and memory as of CoreProcess.

    Raises OutOfMemoryError if less than `needed` bytes are free, ConfigError if there are too few devices, or if the
    other replica is on a Ray cluster.
    """
    from engine.devices import machine_for

    if config.distributed_executor_backend == RAY:
        raise ConfigError(
            "a server with one replica whose ranks are on a Ray cluster gets no others: start it with --dp 2 or more "
            f"and {BACKEND} {RAY}"
        )
    machine = machine_for(config)
    environment = machine.environment(config.replica)
    if environment or config.simulated:
        return environment, None
    # Its share is what is free now: the other replicas have theirs already.
    available = config.data_parallel_size * machine.available_memory()
    check_memory("one more replica needs", needed, available)
    return environment, available


def check_memory(what: str, needed: int, free: int, where: str = "") -> None:
    """Raise OutOfMemoryError if replicas that are added need more bytes than are free.

    `what` and `where` are for the message: what needs them, and on which machine, if not on this one.
    """
    if needed > free:
        raise OutOfMemoryError(
            f"{what} {human_bytes(needed)}, but {human_bytes(free)} are free{where}: use a lower --dp, or start the "
            "server with a smaller --kv-cache-memory-bytes"
        )
