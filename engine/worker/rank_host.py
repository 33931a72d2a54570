"""What runs on the node of a rank: starts the rank's process, and says how it ended. On Ray it is an actor.

The rank's process ends with this one. It gets its commands from the executor directly.
"""

import os
import platform
import threading
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

import engine
from engine.devices.probe import DeviceFacts
from engine.errors import ConfigError, RedlineError
from engine.host import available_memory, cores, shared_host
from engine.ray_cluster import end_with_node
from engine.worker.hosted_rank import HostedRank
from engine.worker.model_copy import ModelCopy, ModelFile, fingerprints
from engine.worker.rank_protocol import RankOptions


class HostFacts(msgspec.Struct, frozen=True):
    """What is to be known of a node before ranks are started.

    Args:
        host: the same for nodes that share cores and memory, see `engine.host.shared_host`.
        memory: free bytes.
        cores: that processes of the node may use.
        versions: of Redline and of Python.
    """

    host: str
    memory: int
    cores: int
    versions: str


def host_facts() -> HostFacts:
    """The facts of this machine."""
    versions = f"Redline {metadata.version('redline-llm')}, Python {platform.python_version()}"
    return HostFacts(shared_host(), available_memory(), cores(), versions)


def fair_memory(ranks: Sequence[HostFacts]) -> int:
    """Free bytes for all ranks together, if each gets as much as the one that has least; the facts are by rank."""
    on_host = Counter(facts.host for facts in ranks)
    return len(ranks) * min(facts.memory // on_host[facts.host] for facts in ranks)


def ranks_beside(ranks: Sequence[HostFacts], rank: int) -> tuple[int, int]:
    """The first rank on a rank's host, and how many are there; ranks of one host have consecutive numbers."""
    hosts = [facts.host for facts in ranks]
    return hosts.index(hosts[rank]), hosts.count(hosts[rank])


def check_versions(node: str, found: HostFacts, here: HostFacts) -> None:
    """Raise ConfigError if a node, given by its address, runs other versions than this machine."""
    if found.versions != here.versions:
        raise ConfigError(f"node {node} runs {found.versions}, this machine {here.versions}: install the same")


class RankHost:
    """One rank's host. Methods may be called from several threads.

    Args:
        name: of the node, in messages.
    """

    def __init__(self, name: str):
        self._name = name
        self._rank: HostedRank | None = None
        self._copy: ModelCopy | None = None
        self._error: RedlineError | None = None
        self._asking = threading.Lock()

    def end_with_node(self) -> None:
        end_with_node()

    def facts(self) -> HostFacts:
        return host_facts()

    def gpu(self) -> DeviceFacts:
        """The GPU that Ray has reserved for the rank, the only one that processes of this actor see."""
        from engine.devices import cuda

        _show_package()
        return cuda.find_gpus(1)

    def fingerprints(self, path: str, names: list[str]) -> dict[str, str] | None:
        """Fingerprints of files below a path, see `engine.worker.model_copy`; None if there is nothing at the path."""
        return fingerprints(Path(path), names) if Path(path).exists() else None

    def find_copy(self, key: str) -> str | None:
        """The folder of a complete copy of a model (see model_copy.py); None if there is none."""
        self._copy = ModelCopy(key)
        found = self._copy.folder
        return None if found is None else str(found)

    def begin_copy(self, files: list[ModelFile]) -> None:
        self._copied.begin(files)

    def write_copy(self, name: str, at: int, piece: bytes) -> None:
        self._copied.write(name, at, piece)

    def finish_copy(self, sums: dict[str, str]) -> str:
        return str(self._copied.finish(sums))

    def drop_copy(self) -> None:
        self._copied.drop()

    def start(self, options: bytes) -> tuple[int, str]:
        """Start the rank with encoded RankOptions; its process id and its name in messages."""
        _show_package()
        self._rank = HostedRank(msgspec.msgpack.decode(options, type=RankOptions), self._name)
        return self._rank.pid, self._rank.name

    def ended(self, timeout_s: float) -> tuple[str, str] | None:
        """Class and message of the error with which the rank has ended; None if it runs after the timeout."""
        rank = self._running()
        if not rank.wait(timeout_s):
            return None
        with self._asking:
            if self._error is None:
                self._error = rank.error(None)
            return type(self._error).__name__, str(self._error)

    def state(self) -> str:
        return self._running().state

    def dump_stacks(self) -> None:
        self._running().dump_stacks()

    def kill(self) -> None:
        self._running().kill()

    @property
    def _copied(self) -> ModelCopy:
        assert self._copy is not None, "no copy was asked for"
        return self._copy

    def _running(self) -> HostedRank:
        assert self._rank is not None, "the rank was not started"
        return self._rank


def _show_package() -> None:
    """Have processes that are started find the package where this one has, however it did."""
    found_at = [str(Path(engine.__path__[0]).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(found_at))
