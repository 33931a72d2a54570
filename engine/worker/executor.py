"""Starts the executor of a configuration: one rank in this process, or several in processes of their own."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from engine.children import RankHandle
from engine.config import EngineConfig
from engine.devices import machine_for
from engine.messages import MemoryLine
from engine.model.model_info import ModelInfo
from engine.ray_cluster import Reservation
from engine.resolved_config import ResolvedConfig
from engine.worker.in_process import InProcessDeviceExecutor, InProcessExecutor
from engine.worker.multiprocess import MultiprocessExecutor
from engine.worker.rank_protocol import DeviceKind
from engine.worker.worker_start import device_start

if TYPE_CHECKING:
    from engine.worker.ray_hosts import RayHosts

Progress = Callable[[int, int], None]


class StartedExecutor(Protocol):
    """An executor (see `engine.core.protocols.Executor`) and what it reports about its start."""

    seconds: dict[str, float]  # of the start, by phase
    kernels: str
    warnings: tuple[str, ...]
    num_blocks: int | None  # of the KV cache, if it was chosen by measuring
    memory: tuple[MemoryLine, ...]  # as measured
    ended: "Future[None]"  # fails with the cause if the ranks end unexpectedly

    @property
    def ranks(self) -> Sequence[RankHandle]:
        """Empty if the only rank is this process."""
        ...

    def submit(self, step: bytes) -> "Future[None]": ...

    def sample(self, step: int, masks: bytes = b"") -> "Future[bytes]": ...

    def call(self, method: str, arguments: dict[str, Any]) -> "Future[Any]": ...

    def shutdown(self) -> None: ...


def reserve_hosts(config: EngineConfig, reservation: Reservation | None = None) -> "RayHosts":
    """Reserve the machines of the ranks, before memory is planned, unless `reservation` has them.

    Raises ConfigError if there are none.
    """
    from engine.worker.ray_hosts import RayHosts

    return RayHosts(config, reservation)


def make_executor(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    *,
    folder: str | None = None,
    progress: Progress | None = None,
    hosts: "RayHosts | None" = None,
) -> StartedExecutor:
    """Start the ranks: load the model and allocate the KV cache. Raises the RedlineError of a rank that can't start.

    Args:
        folder: for files by which ranks find each other; None: the system's folder for temporary files.
        progress: called from a thread with the bytes of weights read so far and in total.
        hosts: of ranks on other machines, see `reserve_hosts`; the executor releases them. None: this machine.
    """
    machine = machine_for(config) if hosts is None else hosts.machine
    device = None
    if machine.torch_type:
        share = config.gpu_memory_utilization or machine.defaults.memory_utilization
        device = DeviceKind(machine.torch_type, machine.kernels == "triton", share, alone=hosts is not None)
    if hosts is not None:
        from engine.worker.hosted_executor import HostedExecutor
        from engine.worker.media_links import MediaLinks
        from engine.worker.tcp_links import TcpLinks

        distribute = config.distribute_weights
        hosts.provide_model(model_info.path, distribute=distribute)
        links = TcpLinks(hosts) if model_info.mm is None else MediaLinks(hosts)
        return HostedExecutor(
            config, model_info, resolved, progress=progress, device=device, links=links, hosts=hosts,
            distribute=distribute,
        )  # fmt: skip
    if config.num_ranks > 1:
        return MultiprocessExecutor(config, model_info, resolved, folder=folder, progress=progress, device=device)
    if device is not None:
        return InProcessDeviceExecutor(config, model_info, resolved, start=device_start(device), progress=progress)
    return InProcessExecutor(config, model_info, resolved, progress=progress)
