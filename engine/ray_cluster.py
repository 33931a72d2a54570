"""The connection of a process to a Ray cluster. Ray is imported only where it is asked for."""

import contextlib
import importlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from engine.errors import ConfigError
from engine.executor_backend import BACKEND, RAY
from engine.text import first_line

FLAG, VARIABLE = "--ray-address", "RAY_ADDRESS"
REACH_S = 5.0  # for a connection to the head of the cluster

log = logging.getLogger("redline.core")


def connect_ray(address: str | None) -> Any:
    """Connect this process to a cluster, as a driver; the module `ray`.

    Args:
        address: HOST:PORT of the cluster's head; None: RAY_ADDRESS, else the cluster that runs on this machine.

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
                ray.init(address=address or "auto", logging_level=logging.WARNING)
            except Exception as error:  # of many classes
                where = f"{given_by} {address}" if address else "no Ray cluster is found"
                raise ConfigError(
                    f"{where}: {first_line(error).rstrip('.')}. Start a node on this machine: `ray start --head`, or "
                    "`ray start --address=HOST:PORT` for one of an existing cluster"
                ) from error
    return ray


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
