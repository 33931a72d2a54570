"""Hosts for load generators on this machine: network namespaces with addresses of their own, or else loopback."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.perf.child_processes import start_child

ROOT = Path(__file__).parents[2]
NETWORK = "10.213.7"


@dataclass(frozen=True, slots=True)
class Host:
    """`prefix` runs a command on it; `address` is its own."""

    address: str
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hosts:
    """Those of the generators, and the address of this machine in their network."""

    server: str
    generators: tuple[Host, ...]
    described: str


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """Hosts on a network of their own; on loopback where namespaces can't be made."""
    loopback = Hosts("127.0.0.1", (Host("127.0.0.1"),) * count, "on loopback")
    names = [f"rlgen{os.getpid()}-{number}" for number in range(count)]
    bridge = f"rlg{os.getpid() % 100000}"
    links = [bridge, *(f"{bridge}o{number}" for number in range(count))]
    try:
        try:
            for command in _commands(bridge, names):
                subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            yield loopback
            return
        found = [Host(f"{NETWORK}.{n + 1}", ("ip", "netns", "exec", name)) for n, name in enumerate(names)]
        yield Hosts(f"{NETWORK}.254", tuple(found), "in network namespaces")
    finally:
        for what, named in (*(("link", one) for one in reversed(links)), *(("netns", one) for one in names)):
            subprocess.run(["ip", what, "delete", named], check=False, capture_output=True)


def _commands(bridge: str, names: list[str]) -> Iterator[list[str]]:
    yield ["ip", "link", "add", bridge, "type", "bridge"]
    yield ["ip", "addr", "add", f"{NETWORK}.254/24", "dev", bridge]
    yield ["ip", "link", "set", bridge, "up"]
    for number, name in enumerate(names):
        inside, outside = f"{bridge}i{number}", f"{bridge}o{number}"
        yield ["ip", "netns", "add", name]
        yield ["ip", "link", "add", inside, "type", "veth", "peer", "name", outside]
        yield ["ip", "link", "set", inside, "netns", name]
        yield ["ip", "link", "set", outside, "master", bridge, "up"]
        yield ["ip", "-n", name, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", inside]
        yield ["ip", "-n", name, "link", "set", inside, "up"]
        yield ["ip", "-n", name, "link", "set", "lo", "up"]


@dataclass(frozen=True, slots=True)
class RunningGenerator:
    address: str  # HOST:PORT
    process: "subprocess.Popen[str]"

    def peak_mib(self) -> float:
        """The most memory that it and its children had, as far as they still run."""
        mine = psutil.Process(self.process.pid)
        return sum(peak_mib(one.pid) for one in (mine, *mine.children(recursive=True)))


@contextmanager
def running_generators(places: tuple[Host, ...], pinned: list[str]) -> Iterator[list[RunningGenerator]]:
    """`redline generate` on each host, with the command that pins it to cores."""
    with ExitStack() as stack:
        found = []
        for host in places:
            generate = [sys.executable, "-m", "cli.main", "generate", "--listen", f"{host.address}:0"]
            process = start_child(
                [*host.prefix, *pinned, *generate],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            )  # fmt: skip
            stack.callback(_end, process)
            assert process.stdout is not None
            line = process.stdout.readline()
            listening = re.search(r"on ([\d.]+:\d+)", line)
            assert listening is not None, line
            found.append(RunningGenerator(listening[1], process))
        yield found


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    process.communicate()


def peak_mib(pid: int) -> float:
    """The most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024
