"""Where the replicas of an engine run on a Ray cluster, and what each of them has there.

A replica of one rank has an actor on any node, on another one than the other replicas as far as there are nodes. The
ranks of a larger replica have a placement group with a CPU for each: on one node where they fit, else on as few as
possible. Its EngineCore is on the node of the first CPU.
"""

import importlib
import secrets
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core_host import CoreHost
from engine.curve import new_secret
from engine.errors import ConfigError, ModelError
from engine.executor_backend import MP
from engine.host import shared_host
from engine.ray_cluster import Reservation, check_free, connect_ray
from engine.text import first_line
from engine.worker.model_copy import list_files
from engine.worker.rank_host import HostFacts, RankHost, check_versions, host_facts
from engine.worker.ray_copies import send_copies

START_S = 60.0  # for an actor to start, or to start its core
THREADS = 4  # of an actor: one waits for reports


@dataclass(frozen=True, slots=True)
class PlacedNode:
    """A node of a replica, and how many of its ranks run there; `host` and `memory` are as of HostFacts."""

    identity: str
    address: str
    host: str
    memory: int
    ranks: int


@dataclass(slots=True)
class Place:
    """Where one replica runs: an actor that starts its core, and the nodes of its ranks, that of the core first.

    Args:
        group: the placement group of its ranks, with its name; None for one rank.
        taken: the numbers of its ranks on each host, see CoreShares.
        shares: as of `engine.ray_cluster.Reservation`.
        memory: bytes for all its ranks.
        models, tokenizers: the folders on each host; empty if they are the same everywhere.
    """

    actor: Any
    group: Any = None
    group_name: str = ""
    nodes: list[PlacedNode] = field(default_factory=list)
    taken: dict[str, range] = field(default_factory=dict)
    shares: dict[str, tuple[int, int]] = field(default_factory=dict)
    memory: int = 0
    models: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of the node of the core."""
        return self.nodes[0].address

    @property
    def description(self) -> str:
        """The nodes, in words."""
        addresses = ", ".join(node.address for node in self.nodes)
        return f"Ray node{'s' if len(self.nodes) > 1 else ''} {addresses}"

    @property
    def is_divided(self) -> bool:
        """Whether its ranks are on several nodes."""
        return len(self.nodes) > 1

    @property
    def ranks_by_host(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for node in self.nodes:
            counts[node.host] += node.ranks
        return counts

    @property
    def reservation(self) -> Reservation | None:
        """What the core needs to start ranks on other nodes; None if they are all on its own."""
        return Reservation(self.group_name, self.address, self.shares, dict(self.models)) if self.is_divided else None

    def config(self, config: EngineConfig, cluster: str) -> EngineConfig:
        """The configuration of the core here; `cluster` is the address of the cluster's head.

        Ranks on one node are processes of that machine, which need no Ray.
        """
        host = self.nodes[0].host
        before, count = self.shares[host]
        model, tokenizer = self.models.get(host), self.tokenizers.get(host)
        return replace(
            config,
            model=model or config.model,
            tokenizer=tokenizer or config.tokenizer,
            distributed_executor_backend=config.distributed_executor_backend if self.is_divided else MP,
            ray_address=cluster if self.is_divided else None,
            distribute_weights=False,  # the files are there already
            host_ranks=(-before, count),
        )


class CoreShares:
    """Numbers of the ranks on each host, over all replicas; a number stands for a part of the host's cores."""

    def __init__(self) -> None:
        self._taken: dict[str, list[range]] = {}

    def take(self, host: str, ranks: int) -> range:
        """The lowest numbers in a row that are free."""
        taken = self._taken.setdefault(host, [])
        begin = 0
        for one in sorted(taken, key=lambda one: one.start):
            if begin + ranks <= one.start:
                break
            begin = one.stop
        found = range(begin, begin + ranks)
        taken.append(found)
        return found

    def give_back(self, host: str, numbers: range) -> None:
        self._taken[host].remove(numbers)

    def total(self, host: str) -> int:
        """The numbers in use, and those between them."""
        return max((one.stop for one in self._taken[host]), default=0)


class RayNodes:
    """The cluster, as the cores of one engine use it. Methods may be called from several threads.

    Args:
        config: of the engine.

    Raises ConfigError if there is no cluster.
    """

    def __init__(self, config: EngineConfig):
        self.ray = connect_ray(config.ray_address)
        self.secret = new_secret()
        self.cluster = str(self.ray.get_runtime_context().gcs_address)
        self._config, self._ranks = config, config.num_ranks
        self._lock = threading.Lock()
        self._shares = CoreShares()
        self._held = 0  # CPUs

    def place(self, count: int) -> list[Place]:
        """Reserve CPUs for replicas, and start the actors of their cores.

        Raises ConfigError if the cluster is too small or busy, or if a node can't run a core, ModelError if a node
        lacks the model and does not get it.
        """
        places = self._reserve_all(count)
        try:
            for place in places:
                self._find_nodes(place)
            ranks = sum((place.ranks_by_host for place in places), Counter[str]())
            with self._lock:
                for place in places:
                    place.taken = {host: self._shares.take(host, on) for host, on in place.ranks_by_host.items()}
                for place in places:
                    place.shares = {host: (on.start, self._shares.total(host)) for host, on in place.taken.items()}
            for place in places:
                place.memory = self._ranks * min(node.memory // ranks[node.host] for node in place.nodes)
            if self._config.distribute_weights:
                self._send_files(places)
        except BaseException:
            for place in places:
                self.release(place)
            raise
        return places

    def release(self, place: Place) -> None:
        """End the actor of a replica, and give back what it has; called once."""
        self.ray.kill(place.actor)
        if place.group is not None:
            self.ray.util.remove_placement_group(place.group)
        with self._lock:
            self._held -= self._ranks
            for host, numbers in place.taken.items():
                self._shares.give_back(host, numbers)

    def _reserve_all(self, count: int) -> list[Place]:
        what = f"{count} replica{'s need' if count > 1 else ' needs'} {count * self._ranks}"
        advice = "start fewer replicas" if self._config.prefill_replicas else "lower --dp"
        if self._ranks > 1:
            what, advice = f"{what}, one for each of {self._ranks} ranks", f"{advice}, or lower --tp or --pp"
        with self._lock:
            check_free(self.ray, count * self._ranks, what, advice, self._held)
            self._held += count * self._ranks
        return [self._reserve() for _ in range(count)]

    def _reserve(self) -> Place:
        actor = self.ray.remote(max_concurrency=THREADS)(CoreHost)
        if self._ranks == 1:
            return Place(actor.options(num_cpus=1, scheduling_strategy="SPREAD").remote())
        name = f"redline-{secrets.token_hex(8)}"
        group = self.ray.util.placement_group([{"CPU": 1}] * self._ranks, strategy="PACK", name=name)
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        first = strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        return Place(actor.options(num_cpus=0, scheduling_strategy=first).remote(), group, name)

    def _find_nodes(self, place: Place) -> None:
        """Wait for the actor, and find out about the nodes of the replica's ranks."""
        ray, model = self.ray, self._config.model
        place.actor.end_with_node.remote()
        try:
            identity, address, facts, has_model = ray.get(place.actor.place.remote(model), timeout=START_S)
        except ray.exceptions.GetTimeoutError as error:
            free = int(ray.available_resources().get("CPU", 0))
            raise ConfigError(
                f"no node of the Ray cluster takes a replica: {free} CPUs are free, and each replica needs "
                f"{self._ranks}: end other jobs (`ray status` shows what is used), or start fewer replicas"
            ) from error
        except ray.exceptions.RayError as error:
            raise _not_installed(error) from error
        check_versions(address, facts, host_facts())
        if not has_model and not self._config.distribute_weights:
            raise ModelError(f"Ray node {address} has no {model}: copy the model there, or give --distribute-weights")
        ranks = Counter({identity: self._ranks})
        if place.group is not None:
            ranks = Counter(ray.util.placement_group_table(place.group)["bundles_to_node_id"].values())
        place.nodes.append(PlacedNode(identity, address, facts.host, facts.memory, ranks.pop(identity)))
        known = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes()}
        for other, count in sorted(ranks.items()):
            found = self._facts(other)
            place.nodes.append(PlacedNode(other, known[other], found.host, found.memory, count))
        if place.is_divided and self._config.prefill_replicas:
            raise ConfigError(
                f"--prefill-replicas needs all ranks of a replica on one node, but {place.description} have those of "
                "one: lower --tp, or give nodes more CPUs with `ray start --num-cpus`"
            )

    def _facts(self, node: str) -> HostFacts:
        """What is to be known of another node than that of a core."""
        helper = self._helper(node)
        try:
            facts: HostFacts = self.ray.get(helper.facts.remote(), timeout=START_S)
        except self.ray.exceptions.RayError as error:
            raise _not_installed(error) from error
        finally:
            self.ray.kill(helper)
        return facts

    def _helper(self, node: str) -> Any:
        """An actor on a node, for a moment."""
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        there = strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        return self.ray.remote(RankHost).options(num_cpus=0, scheduling_strategy=there).remote(f"Ray node {node}")

    def _send_files(self, places: Sequence[Place]) -> None:
        """Send the files of the model to the hosts that lack them, and those of the tokenizer if it has others."""
        here = shared_host()
        nodes = {node.host: node for place in places for node in place.nodes if node.host != here}
        helpers = [self._helper(node.identity) for node in nodes.values()]

        def send(folder: str) -> dict[str, str]:
            path = Path(folder)
            copies = send_copies(self.ray, helpers, path, list_files(path)) if helpers else []
            return {here: folder} | {host: str(copy) for host, copy in zip(nodes, copies, strict=True)}

        try:
            models = tokenizers = send(self._config.model)
            if self._config.tokenizer not in (None, self._config.model):
                tokenizers = send(str(self._config.tokenizer))
        finally:
            for helper in helpers:
                self.ray.kill(helper)
        for place in places:
            place.models, place.tokenizers = models, tokenizers


def _not_installed(error: BaseException) -> ConfigError:
    cause = first_line(getattr(error, "cause", None) or error)
    return ConfigError(
        f"Redline can't be started on a node of the Ray cluster: {cause}. It must be installed there for the Python "
        "that runs Ray"
    )
