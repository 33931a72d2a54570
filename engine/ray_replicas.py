"""Replicas on the nodes of a Ray cluster: each has an actor that starts its EngineCore there (`engine.core_host`).

Ray finds a node with a free CPU, starts the actor, and notices its end. Messages between front ends and cores go over
TCP (`engine.gateway`), not by Ray. Replicas on one host share its cores and its memory.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import zmq

from engine.children import Failure, Loading, Up, decode_report
from engine.config import EngineConfig
from engine.core_host import CoreHost
from engine.core_process import STOP_GRACE_S
from engine.curve import Change, Connections, new_secret, secure_client
from engine.disaggregation import role_of
from engine.errors import ConfigError, EngineDeadError, OutOfMemoryError, RedlineError
from engine.executor_backend import BACKEND, MP, RAY
from engine.frontend.transport import CoreAddress
from engine.gateway import front_end_name
from engine.messages import Ready, Shutdown, encode
from engine.ray_cluster import connect_ray
from engine.text import first_line, human_bytes

START_S = 60.0  # for an actor to start, or to start its core
CONNECT_S = 10.0  # for the connection to a core
LAST_REPORT_S = 2.0  # for the report of a core whose connection is lost
THREADS = 4  # of an actor: one waits for reports


@dataclass(frozen=True, slots=True)
class _Place:
    """An actor on a node, and what it reported."""

    actor: Any
    node: str  # its address
    host: str  # the same for nodes that share cores and memory
    memory: int  # free bytes


class RayNodes:
    """The cluster, as the cores of one engine use it.

    Raises ConfigError if there is no cluster, or if it is too small or busy.
    """

    def __init__(self, address: str | None):
        self.ray = connect_ray(address)
        self.secret = new_secret()
        self._hosts: list[str] = []  # of the cores that run

    def place(self, count: int) -> list[_Place]:
        """Start actors for cores, on as many nodes as possible."""
        ray = self.ray
        there = int(ray.cluster_resources().get("CPU", 0))
        if there < count:
            raise ConfigError(
                f"the Ray cluster has {there} CPUs, and each of {count} replicas needs one: add nodes with `ray start "
                "--address=HOST:PORT`, or start fewer replicas"
            )
        options = ray.remote(CoreHost).options(num_cpus=1, max_concurrency=THREADS, scheduling_strategy="SPREAD")
        actors = [options.remote() for _ in range(count)]
        try:
            return [self._placed(actor) for actor in actors]
        except BaseException:
            for actor in actors:
                ray.kill(actor)
            raise

    def _placed(self, actor: Any) -> _Place:
        ray = self.ray
        try:
            node, host, memory = ray.get(actor.place.remote(), timeout=START_S)
        except ray.exceptions.GetTimeoutError as error:
            free = int(ray.available_resources().get("CPU", 0))
            raise ConfigError(
                f"no node of the Ray cluster takes a replica: {free} CPUs are free, and each replica needs one: end "
                "other jobs (`ray list actors` shows them), or start fewer replicas"
            ) from error
        except ray.exceptions.RayError as error:
            cause = first_line(getattr(error, "cause", None) or error)
            raise ConfigError(
                f"Redline can't be started on a node of the Ray cluster: {cause}. It must be installed there for the "
                "Python that runs Ray"
            ) from error
        return _Place(actor, node, host, memory)

    def host_used(self, host: str) -> int:
        """How many of the cores that run are on a host."""
        return self._hosts.count(host)

    def core_began(self, host: str) -> None:
        self._hosts.append(host)

    def core_ended(self, host: str) -> None:
        self._hosts.remove(host)


class RayCore:
    """The EngineCore of a replica on a node of the cluster; implements `engine.core_process.Core`.

    Args:
        nodes: the cluster.
        place: where it runs.
        config: of the engine on that host, as of `on_host`.
        front_ends: how many there are.
        step_timeout_s: timeout of the core's watchdog; 0: no watchdog.
        memory: bytes that it may use.
    """

    def __init__(
        self,
        nodes: RayNodes,
        place: _Place,
        config: EngineConfig,
        front_ends: int,
        step_timeout_s: float,
        memory: int,
    ):
        self.spawned = time.monotonic()
        self._nodes, self._place, self._config = nodes, place, config
        self._front_ends, self._step_timeout_s = front_ends, step_timeout_s
        self._ready: Ready | None = None
        self._expected_end = False
        self._ending = threading.Lock()
        self._ended = self._released = self._unreachable = False
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._connections = Connections(self._socket)
        secure_client(self._socket, nodes.secret)
        nodes.core_began(place.host)
        self._starting = place.actor.start.remote(
            place.node, nodes.secret, config.describe(), front_ends, step_timeout_s, memory
        )
        self._address = ""

    def wait_ready(self, loading: Callable[[int, int], None] | None = None) -> Ready:
        """Block until the core is up. If it fails to start, its error is raised here."""
        try:
            self._address = self._get(self._starting, START_S)
            while isinstance(report := decode_report(self._get(self._place.actor.next_report.remote())), Loading):
                if loading is not None:
                    loading(report.done, report.total)
            if not isinstance(report, Up):
                assert isinstance(report, Failure)
                raise _on_node(report.error(), self._place.node)
            ready: Ready = report.read(Ready)
            if ready.mm is not None:
                raise ConfigError(
                    f"{BACKEND} {RAY} does not serve models that take images, audio or video: their features are "
                    f"passed to cores in shared memory; use {BACKEND} {MP}"
                )
            self._socket.connect(self._address)
            self._connections.wait_accepted(self._address, CONNECT_S)
        except BaseException:
            self.stop()
            raise
        self._ready = msgspec.structs.replace(ready, device=f"{ready.device} on Ray node {self._place.node}")
        return self._ready

    def address(self, front_end: int, ready: Ready) -> CoreAddress:
        """The addresses at which a front end reaches the core, which has reported `ready`."""
        return CoreAddress(ready, self._address, front_end_name(front_end), self._nodes.secret)

    def watch(self, on_death: Callable[[str], None]) -> None:
        """Call back from a thread, with the cause in one line, if the core ends unexpectedly."""
        reported = threading.Event()

        def lost(cause: str) -> None:
            if not reported.is_set() and not self._expected_end:
                reported.set()
                on_death(cause)

        def wait_for_report() -> None:
            try:
                report = decode_report(self._get(self._place.actor.next_report.remote()))
                lost(str(report.error()) if isinstance(report, Failure) else "the EngineCore sent another report")
            except RedlineError as error:
                self._unreachable = True
                lost(str(error))

        def wait_for_silence() -> None:
            while (change := self._connections.next_change()) not in (Change.LOST, Change.UNWATCHED):
                pass
            if change is Change.LOST and not reported.wait(LAST_REPORT_S):
                self._unreachable = True
                lost(f"Ray node {self._place.node} can't be reached any more, and with it the EngineCore")

        for run in (wait_for_report, wait_for_silence):
            threading.Thread(target=run, name="core-watch", daemon=True).start()

    def successor(self, adapters: tuple[tuple[str, str], ...]) -> "RayCore":
        """A new core with the same options but for its adapters, on any node; this one is stopped first."""
        self.stop()
        return self._another(replace(self._config, adapters=adapters))

    def sibling(
        self,
        config: EngineConfig,
        environment: Mapping[str, str],  # noqa: ARG002
        memory: int | None,  # noqa: ARG002
    ) -> "RayCore":
        """The core of another replica of the same server."""
        return self._another(config)

    def _another(self, config: EngineConfig) -> "RayCore":
        [place] = self._nodes.place(1)
        number = self._nodes.host_used(place.host)
        needed = 0 if self._ready is None else sum(line.bytes for line in self._ready.memory)
        if needed > place.memory:
            self._nodes.ray.kill(place.actor)
            raise OutOfMemoryError(
                f"a replica needs {human_bytes(needed)}, but {human_bytes(place.memory)} are free on Ray node "
                f"{place.node}: use a lower --dp, or start the server with a smaller --kv-cache-memory-bytes"
            )
        one = on_host(config, number, number + 1, config.data_parallel_size)
        arguments = self._front_ends, self._step_timeout_s, place.memory
        return RayCore(self._nodes, place, one, *arguments)

    def stop(self) -> None:
        """End the core, and with it all requests; safe to call twice."""
        self._expected_end = True
        with self._ending:
            if self._ended:
                return
            self._ended = True
            actor, gone = self._place.actor, self._nodes.ray.exceptions.RayError
            if not self._unreachable:
                with contextlib.suppress(zmq.ZMQError, gone):
                    if self._ready is not None:
                        self._socket.send(encode(Shutdown()), zmq.NOBLOCK)
                        self._nodes.ray.get(actor.wait.remote(STOP_GRACE_S), timeout=2 * STOP_GRACE_S)
                    self._nodes.ray.get(actor.close.remote(), timeout=STOP_GRACE_S)
            self._nodes.ray.kill(actor)
            self._release()
            self._connections.stop()
            self._socket.close()

    def _release(self) -> None:
        """The place on its host is free; safe to call twice."""
        if not self._released:
            self._released = True
            self._nodes.core_ended(self._place.host)

    def _get(self, answer: Any, timeout_s: float | None = None) -> Any:
        """An answer of the actor. Raises EngineDeadError if there is none."""
        ray = self._nodes.ray
        try:
            return ray.get(answer, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise EngineDeadError(
                f"the EngineCore on Ray node {self._place.node} failed: {first_line(error.cause or error)}"
            ) from error
        except ray.exceptions.RayError as error:
            raise EngineDeadError(
                f"the EngineCore on Ray node {self._place.node} is gone: its Ray actor or the node was killed"
            ) from error


def _on_node(error: RedlineError, node: str) -> RedlineError:
    """The error of a core, with the node in its message."""
    return type(error)(f"Ray node {node}: {error}")


def on_host(config: EngineConfig, number: int, count: int, replicas: int) -> EngineConfig:
    """The configuration of a core that is one of `count` on its host, and of `replicas` in all.

    Its role is that of `config.replica`, its number among all.
    """
    kv_bytes = config.kv_cache_memory_bytes
    return replace(
        config,
        data_parallel_size=count,
        replica=number,
        role=role_of(config),
        prefill_replicas=0,
        decode_replicas=0,
        distributed_executor_backend=MP,
        ray_address=None,
        kv_cache_memory_bytes=None if kv_bytes is None else kv_bytes * count // replicas,
    )


def start_ray_cores(config: EngineConfig, front_ends: int, step_timeout_s: float) -> list[RayCore]:
    """Start the cores of all replicas, on as many nodes as possible. Raises ConfigError for devices but the CPU."""
    if config.device not in ("auto", "cpu"):
        raise ConfigError(f"{BACKEND} {RAY} runs replicas on the CPU only: give --device cpu")
    config = replace(config, device="cpu")
    nodes, count = RayNodes(config.ray_address), config.data_parallel_size
    places = nodes.place(count)
    on_hosts = Counter(place.host for place in places)
    cores = []
    for number, place in enumerate(places):
        host, shared = place.host, on_hosts[place.host]
        one = on_host(replace(config, replica=number), nodes.host_used(host), shared, count)
        cores.append(RayCore(nodes, place, one, front_ends, step_timeout_s, place.memory // shared))
    return cores


def check_equal(readies: Sequence[Ready]) -> None:
    """Raise ConfigError if replicas on different hosts accept requests of different lengths, or if blocks that one
    computes are of no use to another."""
    lengths = sorted({ready.max_model_len for ready in readies})
    if len(lengths) > 1:
        raise ConfigError(
            f"the nodes have room for requests of {' and '.join(map(str, lengths))} tokens: give --max-model-len "
            f"{lengths[0]}"
        )
    layouts = {ready.kv_layout: ready for ready in readies}
    if len(layouts) > 1:
        kernels = sorted({f"{ready.kernels} in {ready.dtype}" for ready in readies})
        if len(kernels) > 1:
            cause = f"the nodes compute with {' and '.join(kernels)}: give --kernels torch and a --dtype"
        else:
            cause = "the nodes have different files of the model: copy them from one machine to the others"
        raise ConfigError(f"prefill and decode replicas can't exchange KV blocks: {cause}")
