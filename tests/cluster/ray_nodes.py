"""Two nodes of a Ray cluster on this machine, one core each, as two machines would be."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.serving import free_port

START_S = 120.0
ROOT = Path(__file__).parents[2]
SUBNET = "10.213.77"
STARTS = (("--head", "--port=PORT", "--include-dashboard=false"), ("--address=HOST:PORT",))
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_infeasible_task_early_exit": "0", "RAY_TMPDIR": "/tmp",
}  # fmt: skip


@dataclass
class Node:
    """One node: its address, and what a command begins with to run on its machine."""

    address: str
    prefix: Sequence[str] = ()
    process: "subprocess.Popen[bytes] | None" = None
    family: list[psutil.Process] = field(default_factory=list)

    def processes(self) -> list[psutil.Process]:
        """All processes of the node that run."""
        assert self.process is not None
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        known = {one.pid for one in found}
        return found + [one for one in self.family if one.pid not in known and one.is_running()]

    def own_view(self, path: Path) -> Path:
        """Where this machine's own folder at a path is seen from here."""
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/root{path}")

    def ranks(self) -> list[psutil.Process]:
        return [one for one in self.processes() if "engine.worker.rank" in _command(one)]

    def kill(self) -> None:
        """End all processes of the node at once, as if its machine were gone."""
        assert self.process is not None
        family = self.processes()
        for one in family:
            one.suspend()  # so that none can notice the end of another
        for one in family:
            one.kill()
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(family, 10)


@dataclass
class Cluster:
    """`address` is that of the head, HOST:PORT; commands that use the cluster run on the head's machine."""

    address: str
    nodes: tuple[Node, Node]
    environment: dict[str, str]

    def command(self, *arguments: str) -> list[str]:
        """A command of Python on the head's machine."""
        return [*self.nodes[0].prefix, sys.executable, *arguments]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@functools.cache
def no_namespaces() -> str:
    """Why machines with network namespaces of their own can't be made here; empty if they can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "the commands `ip` and `unshare` are missing"
    name = f"rlp{os.getpid()}"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "link", "add", name, "type", "bridge")
        _run("ip", "netns", "exec", name, "unshare", "-C", "true")
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    finally:
        _remove([name], [name])
    return ""


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _remove(links: Sequence[str], namespaces: Sequence[str]) -> None:
    """The links first: connections that are not closed keep a namespace for minutes."""
    for what in (*(("link", name) for name in links), *(("netns", name) for name in namespaces)):
        subprocess.run(["ip", what[0], "delete", what[1]], check=False, capture_output=True)


def make_cache(folder: Path) -> dict[str, str]:
    """The variables of a node that has a user's cache of its own, with the kernels that are compiled already."""
    here = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "kernels"
    here.mkdir(parents=True, exist_ok=True)
    (folder / "redline").mkdir(parents=True)
    (folder / "redline" / "kernels").symlink_to(here)
    return {"XDG_CACHE_HOME": str(folder)}


@contextmanager
def machines(hidden: Path | None = None) -> Iterator[tuple[Node, Node]]:
    """Two machines: network namespaces with addresses of their own, or else two addresses of the loopback interface.

    `hidden`: a folder in whose place the second one has an empty folder, which it alone sees.
    """
    if no_namespaces():
        yield Node("127.0.0.2"), Node("127.0.0.3")
        return
    names = [f"redline-{os.getpid()}-{i}" for i in range(2)]
    bridge = f"rl{os.getpid() % 100000}"
    commands = [["ip", "link", "add", bridge, "type", "bridge"], ["ip", "link", "set", bridge, "up"]]
    for number, name in enumerate(names):
        inside, outside = f"{bridge}i{number}", f"{bridge}o{number}"
        commands += [
            ["ip", "netns", "add", name],
            ["ip", "link", "add", inside, "type", "veth", "peer", "name", outside],
            ["ip", "link", "set", inside, "netns", name],
            ["ip", "link", "set", outside, "master", bridge, "up"],
            ["ip", "-n", name, "addr", "add", f"{SUBNET}.{number + 1}/24", "dev", inside],
            ["ip", "-n", name, "link", "set", inside, "up"],
            ["ip", "-n", name, "link", "set", "lo", "up"],
        ]
    try:
        for one in commands:
            _run(*one)
        yield (
            Node(f"{SUBNET}.1", ("ip", "netns", "exec", names[0])),
            # Also with limits of its own: a node that shares neither cores nor memory with the first.
            Node(f"{SUBNET}.2", ("ip", "netns", "exec", names[1], "unshare", "-C", *_hiding(hidden))),
        )
    finally:
        _remove([f"{bridge}o{number}" for number in range(len(names))] + [bridge], names)


def _hiding(folder: Path | None) -> tuple[str, ...]:
    """The beginning of a command that is executed in a mount namespace of its own with another, empty folder."""
    if folder is None:
        return ()
    return "sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(folder)


@contextmanager
def ray_nodes(
    environments: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
    cpus: tuple[int, int] = (1, 1),
    starts: Sequence[Sequence[str]] = STARTS,
    hidden: Path | None = None,
    gpus: int = 0,
) -> Iterator[Cluster]:
    """A cluster of two nodes; all processes end with the context.

    Args:
        environments: variables of the nodes besides those of this process.
        cpus: of each node.
        starts: what `ray start` is given for each node; HOST and PORT are those of the head.
        hidden: see `machines`.
        gpus: that each node claims to have.
    """
    with machines(hidden) as nodes, tempfile.TemporaryDirectory(prefix="rl-ray-", ignore_cleanup_errors=True) as folder:
        port = free_port()
        address = f"{nodes[0].address}:{port}"
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        shared = {**os.environ, **QUIET, "PYTHONPATH": python_path}
        try:
            for number, node in enumerate(nodes):
                where = [one.replace("HOST", nodes[0].address).replace("PORT", str(port)) for one in starts[number]]
                where.append(f"--num-gpus={gpus}")
                _start(node, where, f"{folder}/{number}", {**shared, **environments[number]}, cpus[number])
            yield Cluster(address, nodes, {**shared, **environments[0]})
        finally:
            for node in reversed(nodes):
                if node.process is not None:
                    node.kill()


def _start(node: Node, where: list[str], folder: str, environment: Mapping[str, str], cpus: int) -> None:
    log = Path(f"{folder}.log")
    ports = {
        name: free_port()
        for name in (
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
        )
    }
    command = [
        *node.prefix, sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block", f"--num-cpus={cpus}",
        f"--node-ip-address={node.address}", f"--object-store-memory={80 << 20}", "--disable-usage-stats",
        "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}",
        *(f"--{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with log.open("wb") as sink:
        node.process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in (shown := log.read_text(errors="replace")):
        assert node.process.poll() is None, f"the node ended:\n{shown}"
        assert time.monotonic() < deadline, f"the node is not up:\n{shown}"
        time.sleep(0.1)
    node.family = psutil.Process(node.process.pid).children(recursive=True)
