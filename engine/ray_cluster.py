"""The connection of a process to a Ray cluster, and what is reserved there. Ray is imported only where it is needed."""

import contextlib
import importlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from engine.errors import ConfigError
from engine.executor_backend import BACKEND, RAY
from engine.text import first_line

FLAG, VARIABLE = "--ray-address", "RAY_ADDRESS"
REACH_S = 5.0  # for a connection to the head of the cluster
FREE_S = 5.0  # for CPUs that are being freed
WATCH_S = 0.5  # between two looks at the raylet
NAMESPACE = "redline"  # of the names of placement groups

log = logging.getLogger("redline.core")


class Reservation(msgspec.Struct, frozen=True):
    """CPUs that the starter of an EngineCore has reserved for its ranks, on several nodes.

    Args:
        group: the name of the placement group.
        node: the address of the node where the core runs.
        shares: of the cores of each host: the ranks of other replicas that come first, and the ranks of all.
        models: the model's folder on each host; empty: it is the same.
    """

    group: str
    node: str
    shares: dict[str, tuple[int, int]]
    models: dict[str, str]


def connect_ray(address: str | None, node: str | None = None) -> Any:
    """Connect this process to a cluster, as a driver; the module `ray`.

    Args:
        address: HOST:PORT of the cluster's head; None: RAY_ADDRESS, else the cluster that runs on this machine.
        node: the address of the node that this process belongs to; None: any node of this machine, first the head.

    Raises ConfigError if Ray is not installed, or if the cluster can't be reached.
    """
    given_by = FLAG
    if address is None and (found := os.environ.get(VARIABLE, "")) not in ("", "auto"):
        address, given_by = found, VARIABLE
    if address is not None:
        _check_reachable(address, given_by)
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"{BACKEND} {RAY} needs Ray: pip install 'redline-llm[ray]' ({error})") from error
    if not ray.is_initialized():
        with _same_signals():
            try:
                ray.init(
                    address=address or "auto",
                    logging_level=logging.WARNING,
                    namespace=NAMESPACE,
                    **({} if node is None else {"_node_ip_address": node}),
                )
            except Exception as error:  # of many classes
                where = f"{given_by} {address}" if address else "no Ray cluster is found"
                raise ConfigError(
                    f"{where}: {first_line(error).rstrip('.')}. Start a node on this machine: `ray start --head`, or "
                    "`ray start --address=HOST:PORT` for one of an existing cluster"
                ) from error
    return ray


def end_with_node() -> None:
    """End this process, an actor's, within a second of the raylet, which started it: Ray may leave it running."""
    raylet = os.getppid()

    def wait() -> None:
        while os.getppid() == raylet:
            time.sleep(WATCH_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="raylet-watch", daemon=True).start()


def check_free(ray: Any, needed: int, what: str, advice: str, held: int = 0) -> None:
    """Wait a moment until enough CPUs of the cluster are free.

    Args:
        needed: CPUs.
        what: needs them, in words.
        advice: which flags to lower.
        held: CPUs that this process has reserved already.

    Raises ConfigError if the cluster is too small, at once, or if other jobs use it.
    """
    deadline = time.monotonic() + FREE_S
    while True:
        there = int(ray.cluster_resources().get("CPU", 0))
        if there - held < needed:
            used = f", of which {held} are used here" if held else ""
            nodes = sum(node["Alive"] for node in ray.nodes())
            on = f"{nodes} node{'' if nodes == 1 else 's'}"
            raise ConfigError(
                f"the Ray cluster has {there} CPUs on {on}{used}, and {what}: add nodes with `ray start "
                f"--address=HOST:PORT`, or {advice}"
            )
        free = int(ray.available_resources().get("CPU", 0))
        if free >= needed:
            return
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{free} of the Ray cluster's {there} CPUs are free, and {what}: end other jobs (`ray status` "
                f"shows what is used), or {advice}"
            )
        time.sleep(0.1)


def _check_reachable(address: str, given_by: str) -> None:
    """Raise ConfigError if nothing listens at HOST:PORT: Ray itself would try for a minute, then end the process.

    `given_by` is the flag or the variable.
    """
    if "://" in address:
        raise ConfigError(
            f"{given_by} {address}: the engine can't be a Ray client; run it on a node of the cluster, and give "
            "HOST:PORT"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{given_by} must be HOST:PORT, such as 10.0.0.1:6379, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except OSError as error:
        raise ConfigError(
            f"{given_by} {address} can't be reached ({error}): is the head of the cluster running (`ray start "
            f"--head --port={port}`), and may this machine connect to it?"
        ) from error


@contextlib.contextmanager
def _same_signals() -> Iterator[None]:
    """Undo that Ray handles SIGTERM: who started this process decides when it ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
