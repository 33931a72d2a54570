"""Replicas on the nodes of a Ray cluster: each has an actor that starts its EngineCore there (`engine.core_host`).

Ray finds nodes with free CPUs (`engine.ray_places`), starts the actor, and notices its end. Messages between front ends
and cores go over TCP (`engine.gateway`), not by Ray. Replicas on one host share its cores and its memory.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import zmq

from engine.children import Failure, Loading, Up, decode_report
from engine.config import EngineConfig
from engine.core_process import STOP_GRACE_S, check_memory
from engine.curve import Change, Connections, secure_client
from engine.errors import ConfigError, EngineDeadError, RedlineError
from engine.executor_backend import BACKEND, RAY
from engine.frontend.transport import CoreAddress
from engine.gateway import front_end_name
from engine.messages import Ready, Shutdown, encode
from engine.ray_places import START_S, Place, RayNodes
from engine.text import first_line

CONNECT_S = 10.0  # for the connection to a core
LAST_REPORT_S = 2.0  # for the report of a core whose connection is lost


class RayCore:
    """The EngineCore of a replica on a node of the cluster; implements `engine.core_process.Core`.

    Args:
        nodes: the cluster.
        place: where it and its ranks run.
        config: of the engine, with the number of the replica.
        front_ends: how many there are.
        step_timeout_s: timeout of the core's watchdog; 0: no watchdog.
    """

    def __init__(self, nodes: RayNodes, place: Place, config: EngineConfig, front_ends: int, step_timeout_s: float):
        self.spawned = time.monotonic()
        self._nodes, self._place, self._config = nodes, place, config
        self._front_ends, self._step_timeout_s = front_ends, step_timeout_s
        self._ready: Ready | None = None
        self._expected_end = False
        self._ending = threading.Lock()
        self._ended = self._unreachable = False
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._connections = Connections(self._socket)
        secure_client(self._socket, nodes.secret)
        here = place.config(config, nodes.cluster)
        self._starting = place.actor.start.remote(
            place.address, nodes.secret, here.describe(), front_ends, step_timeout_s, place.memory, place.reservation
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
                raise self._on_nodes(report.error())
            ready: Ready = report.read(Ready)
            self._socket.connect(self._address)
            self._connections.wait_accepted(self._address, CONNECT_S)
        except BaseException:
            self.stop()
            raise
        if not self._place.is_divided:  # else the core has named the nodes
            ready = msgspec.structs.replace(ready, device=f"{ready.device} on {self._place.description}")
        self._ready = ready
        return ready

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
                error = report.error() if isinstance(report, Failure) else None
                lost("the EngineCore sent another report" if error is None else str(self._on_nodes(error)))
            except RedlineError as error:
                self._unreachable = True
                lost(str(error))

        def wait_for_silence() -> None:
            while (change := self._connections.next_change()) not in (Change.LOST, Change.UNWATCHED):
                pass
            if change is Change.LOST and not reported.wait(LAST_REPORT_S):
                self._unreachable = True
                lost(f"Ray node {self._place.address} can't be reached any more, and with it the EngineCore")

        for run in (wait_for_report, wait_for_silence):
            threading.Thread(target=run, name="core-watch", daemon=True).start()

    def successor(self, adapters: tuple[tuple[str, str], ...]) -> "RayCore":
        """A new core with the same options but for its adapters, on any node; this one is stopped first."""
        self.stop()
        needed = 0 if self._ready is None else sum(line.bytes for line in self._ready.memory)
        return self.sibling(replace(self._config, adapters=adapters), needed)

    def sibling(self, config: EngineConfig, needed: int) -> "RayCore":
        """The core of another replica of the same server; see `engine.core_process.Core`."""
        [place] = self._nodes.place(1)
        try:
            check_memory("a replica needs", needed, place.memory, f" on {place.description}")
        except RedlineError:
            self._nodes.release(place)
            raise
        one = replace(config, device=self._config.device)
        return RayCore(self._nodes, place, one, self._front_ends, self._step_timeout_s)

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
            self._nodes.release(self._place)
            self._connections.stop()
            self._socket.close()

    def _on_nodes(self, error: RedlineError) -> RedlineError:
        """An error of the core with the node in its message."""
        named = any(node.address in str(error) for node in self._place.nodes)
        return error if named else type(error)(f"{self._place.description}: {error}")

    def _get(self, answer: Any, timeout_s: float | None = None) -> Any:
        """An answer of the actor. Raises EngineDeadError if there is none."""
        ray = self._nodes.ray
        try:
            return ray.get(answer, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise EngineDeadError(
                f"the EngineCore on Ray node {self._place.address} failed: {first_line(error.cause or error)}"
            ) from error
        except ray.exceptions.RayError as error:
            raise EngineDeadError(
                f"the EngineCore on Ray node {self._place.address} is gone: its Ray actor or the node was killed"
            ) from error


def start_ray_cores(config: EngineConfig, front_ends: int, step_timeout_s: float) -> list[RayCore]:
    """Start the cores of all replicas, on as many nodes as possible. Raises ConfigError for devices but the CPU."""
    if config.device not in ("auto", "cpu"):
        raise ConfigError(f"{BACKEND} {RAY} runs replicas on the CPU only: give --device cpu")
    config = replace(config, device="cpu")
    nodes = RayNodes(config)
    return [
        RayCore(nodes, place, replace(config, replica=number), front_ends, step_timeout_s)
        for number, place in enumerate(nodes.place(config.data_parallel_size))
    ]


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
