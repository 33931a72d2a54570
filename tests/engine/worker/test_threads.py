"""Spinning and kernels kept are bounded, and the user has the last word."""

import os

import pytest

from engine.config import EngineConfig
from engine.worker.threads import CACHED_KERNELS, SPINS, cores_of_rank, limit_libraries


@pytest.mark.parametrize(
    ("before", "spins", "kernels"),
    [
        ({}, SPINS, CACHED_KERNELS),
        ({"GOMP_SPINCOUNT": "7"}, "7", CACHED_KERNELS),
        ({"OMP_WAIT_POLICY": "active"}, None, CACHED_KERNELS),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}, SPINS, "9"),
    ],
)
def test_a_limit_is_set_unless_the_user_chose(
    before: dict[str, str], spins: str | None, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    limit_libraries()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == kernels


@pytest.mark.parametrize(("replicas", "ranks"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_each_rank_of_each_replica_has_cores_of_its_own(
    replicas: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 18)))
    threads = 8 // (replicas * ranks)
    taken: list[int] = []
    for replica in range(replicas):
        config = EngineConfig(model="m", data_parallel_size=replicas, tensor_parallel_size=ranks, replica=replica)
        for rank in range(ranks):
            taken += cores_of_rank(threads, config.first_rank + rank, config.total_ranks)
    assert taken == list(range(10, 18))
