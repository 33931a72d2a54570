"""Other load on this machine during a load point: CPU time of other processes, and steal time of the hypervisor.

Only known if the server runs on the generator's machine: its processes are found by the port they listen on. User and
system time count. Interrupts do not, since those of the network belong to the load point itself.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import psutil

from bench.results import DISTURBED_SHARE, PointRecord
from bench.target.control import origin

LEAST_CORE_SECONDS = 0.5  # of a load point: CPU time is counted in ticks of 10 ms
# These listen for a server that runs elsewhere, or in a container.
_FORWARDERS = frozenset(
    {"docker-proxy", "rootlessport", "slirp4netns", "pasta", "passt", "ssh", "sshd", "socat", "kubectl"}
)
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "fish", "make", "tmux", "screen", "systemd"})  # not part of a server


@dataclass(frozen=True, slots=True)
class Counters:
    """Counters of CPU seconds over `cores` cores; only differences between two readings have a meaning."""

    at_s: float
    cores: int
    busy_s: float  # of all processes
    steal_s: float  # taken by the hypervisor
    server_s: float
    generator_s: float


@dataclass(frozen=True, slots=True)
class CpuShares:
    """Shares of the cores, 0..1; None if not known."""

    others: float | None
    steal: float | None


class CounterReader(Protocol):
    def read(self) -> Counters | None:
        """The counters now; None if they cannot be read or the server is not on this machine."""
        ...


def shares(before: Counters | None, after: Counters | None) -> CpuShares:
    """The shares of the cores that others used between two readings."""
    if before is None or after is None or before.cores != after.cores:
        return CpuShares(None, None)
    core_seconds = (after.at_s - before.at_s) * after.cores
    if core_seconds < LEAST_CORE_SECONDS:
        return CpuShares(None, None)
    known = after.server_s - before.server_s + after.generator_s - before.generator_s
    others = after.busy_s - before.busy_s - known
    return CpuShares(_share(others, core_seconds), _share(after.steal_s - before.steal_s, core_seconds))


def record_shares(record: PointRecord, before: Counters | None, after: Counters | None) -> None:
    """Set the load point's columns about other load, and whether it is disturbed."""
    found = shares(before, after)
    record.others_cpu_share, record.steal_share = found.others, found.steal
    record.disturbed = (found.others or 0.0) + (found.steal or 0.0) > DISTURBED_SHARE


class MachineReader:
    """Counters of this machine for a server.

    Args:
        base_url: of the server.
        generators: ids of processes on this machine that generate load and were not started by this one.
    """

    def __init__(self, base_url: str, generators: Iterable[int] = ()):
        _, host, self._port = origin(base_url)
        self._generators = tuple(generators)
        self.is_local = _is_this_machine(host)

    def read(self) -> Counters | None:
        server = self._server() if self.is_local else None
        if not server:
            return None
        own = os.times()
        cores = _cores(server)
        ticks = [times for core, times in enumerate(psutil.cpu_times(percpu=True)) if core in cores]
        return Counters(
            at_s=time.monotonic(),
            cores=len(ticks),
            busy_s=sum(t.user + t.system + getattr(t, "nice", 0.0) for t in ticks),
            steal_s=sum(getattr(t, "steal", 0.0) for t in ticks),
            server_s=sum(map(_cpu_s, server)),
            # With children: generator processes have ended by the second reading.
            generator_s=own.user + own.system + own.children_user + own.children_system + self._others_s(),
        )

    def _others_s(self) -> float:
        """CPU seconds of generators that were not started by this process."""
        found = 0.0
        for pid in self._generators:
            with contextlib.suppress(psutil.Error):
                found += _cpu_s(psutil.Process(pid))
        return found

    def server_pids(self) -> frozenset[int]:
        """The server's processes; empty if they cannot be found or run on another machine."""
        return frozenset(process.pid for process in self._server()) if self.is_local else frozenset()

    def _server(self) -> list[psutil.Process]:
        """The processes that listen on the port, their ancestors in the same process group, and all descendants."""
        try:
            connections = psutil.net_connections("tcp")
        except psutil.Error:  # some systems list them for root only
            return []
        waiting = [c for c in connections if c.status == psutil.CONN_LISTEN]
        listening = {c.pid for c in waiting if c.laddr and c.laddr.port == self._port}
        if not listening or None in listening:
            return []
        processes = {p.pid: p for p in psutil.process_iter(["name", "ppid"])}
        if any(processes[pid].info["name"] in _FORWARDERS for pid in listening if pid in processes):
            return []
        found = {_root(pid, processes) for pid in listening if pid is not None}
        grown = True
        while grown:
            children = {pid for pid, p in processes.items() if p.info["ppid"] in found} - found
            found |= children
            grown = bool(children)
        return [processes[pid] for pid in found - {os.getpid()} if pid in processes]


def _root(pid: int, processes: dict[int, psutil.Process]) -> int:
    """The topmost ancestor of `pid` in the same process group that is not a shell."""
    mine = {os.getpid(), os.getppid()}
    while pid in processes:
        parent = processes[pid].info["ppid"]
        shell = parent not in processes or processes[parent].info["name"] in _SHELLS
        if shell or parent in mine or _group(parent) != _group(pid):
            break
        pid = parent
    return pid


def _is_this_machine(host: str) -> bool:
    with contextlib.suppress(OSError):
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
        own = {address.address.partition("%")[0] for group in psutil.net_if_addrs().values() for address in group}
        return any(address in own or address.startswith("127.") or address == "::1" for address in addresses)
    return False


def _cores(server: Iterable[psutil.Process]) -> set[int]:
    """The cores that the generator or the server may use; load on other cores does not disturb them."""
    if not hasattr(os, "sched_getaffinity"):
        return set(range(psutil.cpu_count() or 1))
    cores = set(os.sched_getaffinity(0))
    for process in server:
        with contextlib.suppress(psutil.Error):
            cores |= set(process.cpu_affinity() or ())
    return cores


def _cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process and of its ended children; running children are counted themselves."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    ended = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return float(times.user + times.system + ended)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _share(seconds: float, core_seconds: float) -> float:
    return min(1.0, max(0.0, seconds / core_seconds))
