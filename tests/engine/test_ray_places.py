"""What a replica on a Ray cluster has of its hosts: numbers of cores, the configuration of its core."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.disaggregation import DECODE, PREFILL, role_of
from engine.errors import ConfigError
from engine.ray_cluster import check_free
from engine.ray_places import CoreShares, Place, PlacedNode

HOSTS = ("a", "b")
CONFIG = EngineConfig(
    model="/m", tokenizer="/m", tensor_parallel_size=2, data_parallel_size=3, replica=2, distribute_weights=True,
    distributed_executor_backend="ray", ray_address="10.0.0.1:6379", kv_cache_memory_bytes=3 << 20,
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(HOSTS), st.integers(1, 4), st.booleans())))
def test_numbers_are_never_shared(steps: list[tuple[str, int, bool]]) -> None:
    shares = CoreShares()
    taken: dict[str, list[range]] = {host: [] for host in HOSTS}
    for host, ranks, gives_back in steps:
        if gives_back and taken[host]:
            shares.give_back(host, taken[host].pop(ranks % len(taken[host])))
            continue
        found = shares.take(host, ranks)
        assert len(found) == ranks
        numbers = {number for one in taken[host] for number in one}
        assert not numbers & set(found)
        before = [at for at in range(found.start) if not numbers & set(range(at, at + ranks))]
        assert not before, "lower ones are free"
        taken[host].append(found)
        assert shares.total(host) == max(one.stop for one in taken[host])


def place(*nodes: PlacedNode, shares: dict[str, tuple[int, int]], **more: Any) -> Place:
    return Place(None, None, "group", list(nodes), shares=shares, **more)


def test_ranks_on_one_node_need_no_ray() -> None:
    """They are the second two of four ranks on that host."""
    placed = place(PlacedNode("1", "10.0.0.1", "a", 1 << 30, 2), shares={"a": (2, 4)})
    config = placed.config(CONFIG, "10.0.0.1:6379")
    assert (config.distributed_executor_backend, config.ray_address, config.distribute_weights) == ("mp", None, False)
    assert (config.first_rank, config.total_ranks) == (2, 4)
    assert (config.replica, config.data_parallel_size, config.kv_cache_memory_bytes) == (2, 3, 3 << 20)
    assert (config.model, config.tokenizer) == ("/m", "/m")
    assert placed.reservation is None
    assert placed.description == "Ray node 10.0.0.1"


def test_a_replica_on_a_node_keeps_the_role_of_its_number() -> None:
    given = replace(CONFIG, prefill_replicas=2, decode_replicas=1)
    placed = place(PlacedNode("1", "10.0.0.1", "a", 1 << 30, 2), shares={"a": (0, 2)})
    configs = [placed.config(replace(given, replica=number), "10.0.0.1:6379") for number in range(3)]
    assert [role_of(one) for one in configs] == [PREFILL, PREFILL, DECODE]
    assert EngineConfig(**configs[2].describe()) == configs[2]


def test_ranks_on_several_nodes_are_started_by_ray_again() -> None:
    nodes = PlacedNode("1", "10.0.0.1", "a", 1 << 30, 1), PlacedNode("2", "10.0.0.2", "b", 1 << 30, 1)
    copies = {"a": "/m", "b": "/copy"}
    placed = place(*reversed(nodes), shares={"a": (2, 3), "b": (0, 1)}, models=copies, tokenizers=copies)
    config = placed.config(CONFIG, "10.0.0.1:6379")
    assert (config.distributed_executor_backend, config.ray_address) == ("ray", "10.0.0.1:6379")
    assert (config.model, config.tokenizer) == ("/copy", "/copy")
    assert config.total_ranks == 1
    reservation = placed.reservation
    assert reservation is not None
    assert (reservation.group, reservation.node, reservation.shares) == ("group", "10.0.0.2", placed.shares)
    assert reservation.models == copies
    assert placed.description == "Ray nodes 10.0.0.2, 10.0.0.1"
    assert placed.ranks_by_host == {"a": 1, "b": 1}


class Cluster:
    """In place of the module `ray`: the CPUs that there are, and those that are free at each look."""

    def __init__(self, there: int, *free: int):
        self._there, self._free = there, list(free)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}, {"Alive": False}]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self._there)}

    def available_resources(self) -> dict[str, float]:
        free = self._free.pop(0) if len(self._free) > 1 else self._free[0]
        return {"CPU": float(free)} if free else {}


def test_cpus_that_are_being_freed_are_waited_for() -> None:
    cluster = Cluster(4, 0, 1, 2)
    check_free(cluster, 2, "", "")
    assert cluster.available_resources() == {"CPU": 2}


@pytest.mark.parametrize(
    ("there", "free", "held", "said"),
    [
        (3, 3, 0, "^the Ray cluster has 3 CPUs on 1 node, and it needs 4: add nodes .*, or lower --dp$"),
        (5, 1, 4, "^the Ray cluster has 5 CPUs on 1 node, of which 4 are used here, and it needs 4: add nodes"),
        (8, 1, 0, "^1 of the Ray cluster's 8 CPUs are free, and it needs 4: end other jobs .*, or lower --dp$"),
    ],
)
def test_too_few_cpus_are_an_error(
    there: int, free: int, held: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.ray_cluster.FREE_S", 0.0)
    with pytest.raises(ConfigError, match=said):
        check_free(Cluster(there, free), 4, "it needs 4", "lower --dp", held)
