"""What the core of a replica that is added later gets: the sizes of the first one."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from engine.core_process import share_left
from engine.disaggregation import DECODE, PREFILL, role_of
from engine.errors import ConfigError, OutOfMemoryError
from engine.messages import MemoryLine, Ready
from engine.replicas import PROCESS_BYTES, check_room, start_another

GIB = 1 << 30
READY = Ready(
    "/m", "cpu", "float32", 320, 128, 4, 64, 16, 9, True,
    memory=(MemoryLine("weights", GIB, ""), MemoryLine("KV cache", 2 * GIB, "")),
)  # fmt: skip


class Core:
    """In place of a process: what it would be started with."""

    def sibling(self, config: EngineConfig, needed: int) -> Any:
        return config, needed


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The free memory of the machine, in bytes."""
    free = [64 * GIB]
    monkeypatch.setattr("engine.devices.cpu.available_memory", lambda: free[0])
    return free


@pytest.mark.usefixtures("free")
def test_it_has_the_sizes_of_the_first():
    config = EngineConfig(model="/m", device="cpu")
    added, needed = start_another(Core(), READY, config, 2, 3)  # type: ignore[arg-type, misc]
    assert (added.replica, added.data_parallel_size, needed) == (2, 3, 3 * GIB)
    assert (added.max_model_len, added.max_num_seqs, added.max_num_batched_tokens) == (128, 4, 64)
    assert added.block_size == 16
    assert added.kv_cache_memory_bytes // added.data_parallel_size == 2 * GIB


@pytest.mark.usefixtures("free")
def test_its_share_of_the_memory_is_what_the_others_left():
    config = EngineConfig(model="/m", device="cpu", data_parallel_size=2, replica=1)
    assert share_left(config, 64 * GIB) == ({}, 64 * GIB)


@pytest.mark.usefixtures("free")
def test_its_number_may_be_higher_than_the_number_of_replicas():
    """Others are being drained."""
    added, _ = start_another(Core(), READY, EngineConfig(model="/m", device="cpu"), 5, 2)  # type: ignore[arg-type, misc]
    assert (added.replica, added.data_parallel_size) == (5, 6)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(("number", "count", "role"), [(3, 4, DECODE), (2, 3, DECODE), (1, 1, PREFILL)])
def test_the_number_decides_about_the_role(number: int, count: int, role: str):
    config = EngineConfig(model="/m", device="cpu", prefill_replicas=2, decode_replicas=1)
    added, _ = start_another(Core(), READY, config, number, count)  # type: ignore[arg-type, misc]
    assert role_of(added) == role


def test_memory_that_is_not_there_is_an_error(free: list[int]):
    free[0] = GIB
    with pytest.raises(OutOfMemoryError, match=r"needs 3\.0 GiB, but 1\.0 GiB are free: use a lower --dp"):
        share_left(EngineConfig(model="/m", device="cpu", data_parallel_size=2, replica=1), 3 * GIB)


def test_one_replica_on_a_ray_cluster_gets_no_others():
    config = EngineConfig(
        model="/m", device="cpu", data_parallel_size=2, tensor_parallel_size=2, distributed_executor_backend="ray"
    )
    with pytest.raises(ConfigError, match="gets no others: start it with --dp 2 or more"):
        share_left(config, GIB)


def test_replicas_that_start_together_must_fit_together(monkeypatch: pytest.MonkeyPatch):
    each = 3 * GIB + PROCESS_BYTES
    monkeypatch.setattr("engine.replicas.available_memory", lambda: 4 * each)
    config = EngineConfig(model="/m", device="cpu")
    check_room(READY, config, 4)
    with pytest.raises(OutOfMemoryError, match=r"5 more replicas need 15\.9 GiB, but 12\.8 GiB are free: use a lower"):
        check_room(READY, config, 5)
    check_room(msgspec.structs.replace(READY, device="cuda (NVIDIA H100)"), config, 60)  # each has memory of its own
    check_room(READY, replace(config, data_parallel_size=2, distributed_executor_backend="ray"), 60)
