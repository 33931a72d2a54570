"""What runs on the node of a replica: starts the EngineCore's process, and the gateway by which front ends reach it.

On Ray it is an actor. The EngineCore's process ends with this one.
"""

import importlib
import os
import time
from pathlib import Path
from typing import Any

import engine
from engine.children import Failure, Report, ReportingChild, encode_report
from engine.core_process import CoreOptions, Endpoints
from engine.gateway import Gateway
from engine.kv_transfer import KVTcp
from engine.multimodal.feature_files import remove_stale_features
from engine.ray_cluster import Reservation, end_with_node
from engine.socket_folder import SocketFolder
from engine.worker.rank_host import HostFacts, host_facts


class CoreHost:
    """The host of one core. `next_report` may be called from one thread while others call other methods."""

    def __init__(self) -> None:
        self._node = "this machine"
        self._child: ReportingChild | None = None

    def end_with_node(self) -> None:
        end_with_node()

    def place(self, model: str) -> tuple[str, str, HostFacts, bool]:
        """Ray's identity of the node, its address, its facts, and whether a file or folder of this path is there."""
        ray = importlib.import_module("ray")
        address = str(ray.util.get_node_ip_address())
        self._node = f"Ray node {address}"
        return str(ray.get_runtime_context().get_node_id()), address, host_facts(), Path(model).exists()

    def start(
        self,
        host: str,
        secret: str,
        config: dict[str, Any],
        front_ends: int,
        step_timeout_s: float,
        memory: int,
        reservation: Reservation | None,
    ) -> str:
        """Start the core; the address at which front ends reach it.

        Args:
            host: the address of this machine.
            secret: of the run.
            config: the fields of the EngineConfig.
            front_ends: how many there are.
            step_timeout_s: timeout of the core's watchdog; 0: no watchdog.
            memory: bytes that the core may use.
            reservation: of the nodes of its ranks; None: they run on this machine.
        """
        # The process must find the package where this one has, however it did.
        found_at = [str(Path(engine.__path__[0]).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(found_at))
        self._folder = SocketFolder()
        endpoints = Endpoints.in_folder(self._folder.path, front_ends)
        self._gateway = Gateway(host, secret, endpoints.to_core, endpoints.from_core)
        addresses = endpoints.to_core, endpoints.from_core
        kv_tcp = KVTcp(host, secret)
        self._child = ReportingChild(
            "engine.launch",
            CoreOptions(config, *addresses, step_timeout_s, memory, {}, time.monotonic(), reservation, kv_tcp),
            name=f"the EngineCore on {self._node}",
            memory_advice="lower --kv-cache-memory-bytes",
        )
        return self._gateway.address

    def next_report(self) -> bytes:
        """The next report, encoded; once the core has ended, the error with which it did."""
        child = self._core
        report: Report | None = child.next_report()
        if report is None or isinstance(report, Failure):
            child.wait()
            report = Failure.of(child.error(report, named=False))
        return encode_report(report)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the core; False if it still runs after the timeout."""
        return self._core.wait(timeout_s)

    def close(self) -> None:
        """End the core if it still runs, and remove what it used."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._gateway.close()
            self._folder.remove()
            remove_stale_features()  # of a core that was killed

    @property
    def _core(self) -> ReportingChild:
        assert self._child is not None, "the core was not started"
        return self._child
