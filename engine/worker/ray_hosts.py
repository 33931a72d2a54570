"""The hosts of ranks that run on the nodes of a Ray cluster: each rank has an actor that starts its process.

A placement group reserves a CPU of Ray for each rank, and on GPUs a GPU. A rank on the CPU uses its share of all cores
of its node, one on a GPU sees no other. Ray starts the actors and notices when they end. Steps and their results go by
TCP links, not by Ray.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine.children import Failure
from engine.config import EngineConfig
from engine.devices import probe
from engine.devices.machine import Machine
from engine.devices.probe import DeviceFacts
from engine.errors import ConfigError, EngineDeadError, RedlineError
from engine.host import shared_host
from engine.ray_cluster import Reservation, connect_ray
from engine.text import first_line
from engine.worker.model_copy import (
    ModelFile,
    check_same,
    copy_key,
    fingerprints,
    list_adapter,
    list_files,
    names_of_model,
)
from engine.worker.rank_host import HostFacts, RankHost, check_versions, fair_memory, host_facts, ranks_beside
from engine.worker.rank_protocol import RankOptions
from engine.worker.ray_copies import send_copies
from engine.worker.ray_devices import CPUS, GPUS, Resources, choose, machine_of

PLACE_S = 30.0  # for the placement group
START_S = 60.0  # for an actor to start, or to start the process of its rank
ASK_S = 1.0  # for an actor's answer
THREADS = 4  # of an actor, so that it answers while something waits for the end of its rank


@dataclass(slots=True)
class _Node:
    """A node of the cluster; `answers` is false once an actor on it has not answered."""

    identity: str
    address: str
    answers: bool = True


@dataclass(slots=True)
class _Place:
    """An actor, its node, and what it reported."""

    actor: Any
    node: _Node
    facts: HostFacts


class RayRank:
    """Implements `engine.worker.rank_links.LinkedRank`, by the rank's actor."""

    def __init__(self, ray: Any, place: _Place, pid: int, name: str):
        self.pid = pid
        self.name = name
        self._ray = ray
        self._place = place
        self._error: RedlineError | None = None

    @property
    def state(self) -> str:
        return self._ask("state") or ""

    def wait(self, timeout_s: float | None = None) -> bool:
        while self._error is None:
            wait_s = START_S if timeout_s is None else timeout_s
            ended = self._ask("ended", wait_s, within_s=wait_s + ASK_S)
            if ended is not None:
                self._error = Failure(*ended).error()
            if timeout_s is not None or not self._place.node.answers:
                break
        return self._error is not None

    def error(self, failure: Failure | None) -> RedlineError:
        if failure is not None:
            error = failure.error()
            return type(error)(f"{self.name}: {error}")
        return self._error or EngineDeadError(f"{self.name} can't be asked how it ended")

    def dump_stacks(self) -> None:
        self._ask("dump_stacks")

    def kill(self) -> None:
        """The process ends with its actor, which Ray ends even if it does not answer."""
        self._ray.kill(self._place.actor)

    def close(self) -> None:
        self._ray.kill(self._place.actor)

    def _ask(self, method: str, *arguments: Any, within_s: float = ASK_S) -> Any:
        """The answer of the actor; None if there is none, which is remembered of its node."""
        node, exceptions = self._place.node, self._ray.exceptions
        if not node.answers:
            return None
        try:
            return self._ray.get(getattr(self._place.actor, method).remote(*arguments), timeout=within_s)
        except exceptions.ActorDiedError:
            if self._error is None:
                self._error = EngineDeadError(f"{self.name} ended with its Ray actor: the actor or its node was killed")
        except exceptions.RayError:  # no answer in time, or no connection to the node
            node.answers = False
        return None


class RayHosts:
    """Implements `engine.worker.tcp_links.RankHosts`. The constructor reserves the nodes and starts the actors.

    Ranks of one host have consecutive numbers, those of this machine the first.

    Args:
        config: of the replica.
        reservation: of CPUs; None: they, or GPUs, are reserved here.

    Attributes:
        machine: what the ranks run on, for planning.

    Raises ConfigError if there is no cluster, if it is too small or busy, or if its nodes run other versions.
    """

    machine: Machine

    def __init__(self, config: EngineConfig, reservation: Reservation | None = None):
        self._ray = ray = connect_ray(config.ray_address, None if reservation is None else reservation.node)
        self.address = str(ray.util.get_node_ip_address()) if reservation is None else reservation.node
        self._shares = {} if reservation is None else reservation.shares
        # The model's folder by host, where it is a copy.
        self._models = {} if reservation is None else reservation.models
        self._group = None  # that is to be removed
        try:
            if reservation is None:
                resources = choose(config, int(ray.cluster_resources().get("GPU", 0)))
                group = self._group = self._reserve(config.num_ranks, resources)
            else:
                resources, group = CPUS, ray.util.get_placement_group(reservation.group)
            self._places = self._start_actors(group, config.num_ranks, resources)
            here = host_facts()
            for place in self._places:
                check_versions(place.node.address, place.facts, here)
            self.machine = machine_of(config, self._find_gpus() if resources is GPUS else [])
        except BaseException:
            self.close()
            raise

    @property
    def available_memory(self) -> int:
        """Free bytes for all ranks together: on GPUs theirs, else see `engine.worker.rank_host.fair_memory`."""
        if self.machine.torch_type:
            return self.machine.available_memory()
        return fair_memory([place.facts for place in self._places])

    @property
    def description(self) -> str:
        """The nodes, in words."""
        return f"Ray nodes {', '.join(dict.fromkeys(place.node.address for place in self._places))}"

    def address_of(self, rank: int) -> str:
        return self._places[rank].node.address

    def provide_model(self, path: Path, *, distribute: bool) -> None:
        """Make sure that each node has the files of the model: at the same path or, if they are distributed, a copy.

        Raises ModelError if a node has none, or other files.
        """
        if self._models:  # whoever reserved the nodes has sent them
            return
        if distribute:
            self._models = {host: str(copy) for host, copy in self._send(path, list_files(path)).items()}
        else:
            self._check_files(path, names_of_model(path), "model")

    def provide_adapter(self, path: Path, *, distribute: bool) -> str:
        """The same of a LoRA adapter; the key of the copies (see model_copy.py), empty if there are none.

        Whether the files are an adapter is for the ranks to find out.
        """
        files = list_adapter(path)
        if not files:
            return ""
        if distribute:
            self._send(path, files)
            return copy_key(path, files)
        self._check_files(path, [file.name for file in files], "adapter")
        return ""

    @property
    def _other_hosts(self) -> dict[str, _Place]:
        """A place on each host but this one."""
        places = {place.facts.host: place for place in self._places}
        places.pop(shared_host(), None)
        return places

    def _send(self, path: Path, files: list[ModelFile]) -> dict[str, Path]:
        """Send files to the other hosts; where they lie there."""
        others = self._other_hosts
        copies = send_copies(self._ray, [place.actor for place in others.values()], path, files)
        return dict(zip(others, copies, strict=True))

    def _check_files(self, path: Path, names: list[str], what: str) -> None:
        others = self._other_hosts.values()
        own = fingerprints(path, names) if others else {}
        asked = [(place.node.address, place.actor.fingerprints.remote(str(path), names)) for place in others]
        for address, answer in asked:
            try:
                found = self._ray.get(answer, timeout=START_S)
            except self._ray.exceptions.RayError as error:
                raise EngineDeadError(f"node {address} can't be asked for its files: {_cause(error)}") from error
            check_same(address, path, what, own, found)

    def start(self, options: RankOptions) -> RayRank:
        place = self._places[options.rank]
        first, count = ranks_beside([one.facts for one in self._places], options.rank)
        before, total = self._shares.get(place.facts.host, (0, count))
        options.config = {**options.config, "host_ranks": (first - before, total)}
        model = self._models.get(place.facts.host, options.model_info["path"])
        options.model_info = {**options.model_info, "path": model}
        started = place.actor.start.remote(msgspec.msgpack.encode(options))
        try:
            pid, name = self._ray.get(started, timeout=START_S)
        except self._ray.exceptions.RayError as error:
            raise EngineDeadError(
                f"rank {options.rank} can't be started on node {place.node.address}: {_cause(error)}"
            ) from error
        return RayRank(self._ray, place, pid, name)

    def close(self) -> None:
        if self._group is not None:
            self._ray.util.remove_placement_group(self._group)
            self._group = None
        self._ray.shutdown()

    def _reserve(self, ranks: int, resources: Resources) -> Any:
        """The placement group, once the cluster has room for it."""
        ray, scarce = self._ray, resources.scarce
        there, nodes = int(ray.cluster_resources().get(scarce, 0)), sum(node["Alive"] for node in ray.nodes())
        if there < ranks:
            raise ConfigError(
                f"the Ray cluster has {there} {scarce}s on {nodes} nodes, and {ranks} ranks need one each: add nodes "
                "with `ray start --address=HOST:PORT`, or lower --tp or --pp"
            )
        group = ray.util.placement_group([resources.of_rank] * ranks, strategy=resources.strategy)
        if not group.wait(PLACE_S):
            free = int(ray.available_resources().get(scarce, 0))
            ray.util.remove_placement_group(group)
            raise ConfigError(
                f"{free} of the Ray cluster's {there} {scarce}s are free, and {ranks} ranks need one each: end other "
                "jobs (`ray status` shows what is used), or lower --tp or --pp"
            )
        return group

    def _find_gpus(self) -> list[tuple[str, DeviceFacts]]:
        """The GPU of each rank, and the address of its node."""
        asked = [place.actor.gpu.remote() for place in self._places]
        found = []
        for place, answer in zip(self._places, asked, strict=True):
            try:
                found.append((place.node.address, self._ray.get(answer, timeout=probe.TIMEOUT_S + START_S)))
            except self._ray.exceptions.RayError as error:
                raise ConfigError(f"node {place.node.address} can't be asked for its GPU: {_cause(error)}") from error
        return found

    def _start_actors(self, group: Any, ranks: int, resources: Resources) -> list[_Place]:
        ray = self._ray
        strategy = importlib.import_module("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy
        table = ray.util.placement_group_table(group)["bundles_to_node_id"]
        known = {node["NodeID"]: _Node(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes()}
        actors = []
        for number in range(ranks):
            node = known[table[number]]
            actor = ray.remote(RankHost).options(
                num_cpus=resources.of_rank["CPU"],
                num_gpus=resources.of_rank.get("GPU", 0),
                max_concurrency=THREADS,
                scheduling_strategy=strategy(group, placement_group_bundle_index=number),
            )
            actors.append((node, actor.remote(f"node {node.address}")))
        for _, actor in actors:
            actor.end_with_node.remote()
        places = [self._place(node, actor, actor.facts.remote()) for node, actor in actors]
        here, this_host = ray.get_runtime_context().get_node_id(), shared_host()

        def nearness(place: _Place) -> tuple[bool, str, bool, str]:
            host, node = place.facts.host, place.node.identity
            return host != this_host, host, node != here, node

        return sorted(places, key=nearness)

    def _place(self, node: _Node, actor: Any, facts: Any) -> _Place:
        try:
            return _Place(actor, node, self._ray.get(facts, timeout=START_S))
        except self._ray.exceptions.RayError as error:
            raise ConfigError(
                f"Redline can't be started on node {node.address} of the Ray cluster: {_cause(error)}. It must be "
                "installed there for the Python that runs Ray"
            ) from error


def _cause(error: BaseException) -> str:
    """The cause of an error of Ray, whose message is a traceback of the actor, in one line."""
    return first_line(getattr(error, "cause", None) or error)
